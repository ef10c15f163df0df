"""A model's weights as the engine reads them: under timm's names where it has them, and what does not depend on the
image computed beforehand.

    attn.qkv          one layer, whatever the model keeps of it: q_proj, k_proj and v_proj, or biases apart
    mlp.fc1           of a gated MLP the gates' rows, then the values'
    attn.proj, fc2    times the layer scale
    prefix            class token and registers with their positions, behind the norm before the blocks
    positions         of the grid of the engine's images; rotary: the same of rotary positions
    attn_pool.keys    what a token is multiplied with to get its score: see csrc/cpu/engine/pool.h
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.attention_rope import EvaAttention
from ..model.deit import VisionTransformerDistilled
from ..model.layers import LayerScale
from ..model.mlp import SwiGLU
from ..model.naflex import NaFlexVit
from .accepts import tensor_of
from .known import NORMS


def tensors_of(model: Any, modules: dict[str, Any]) -> dict[str, Tensor]:
    """name -> tensor in float32 on the CPU, all that the engine reads."""
    tensors = {name: torch.tensor(getattr(model.preprocess, name), device="cpu") for name in ("mean", "std")}
    tensors |= _tokens(model) | _norm("norm_pre", model.norm_pre) | _norm("patch_embed.norm", model.patch_embed.norm)
    for i, name in enumerate(modules["blocks"]._modules):
        tensors |= _block(f"blocks.{i}", modules[f"blocks.{name}"])
    # The engine has one norm at the end, whatever side of the pooling it stands on.
    tensors |= _norm("norm", model.norm) | _norm("norm", model.fc_norm) | _head(model)
    if model.attn_pool is not None:
        tensors |= _attention_pool(model.attn_pool)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _value(module: nn.Module, name: str) -> Tensor | None:
    tensor = tensor_of(module, name)
    return None if tensor is None else tensor.detach().to("cpu", torch.float32)


def _layer(module: Any) -> tuple[Tensor, Tensor]:
    """Weight [outputs, inputs] and bias of a linear layer or a convolution of patches."""
    weight, bias = _value(module, "weight"), _value(module, "bias")
    assert weight is not None  # accepts.py has looked
    return weight.flatten(1), weight.new_zeros(len(weight)) if bias is None else bias


def _named(name: str, layer: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.weight": layer[0], f"{name}.bias": layer[1]}


def _norm(name: str, module: Any) -> dict[str, Tensor]:
    if not isinstance(module, NORMS):
        return {}
    found = {f"{name}.{key}": _value(module, key) for key in ("weight", "bias") if hasattr(module, key)}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def _tokens(model: Any) -> dict[str, Tensor]:
    """What the tokens are before the first block, of the grid of images of the model's own size."""
    embed: Any = model.patch_embed
    weight, bias = _layer(embed.proj)
    tokens = [_value(embed if isinstance(model, NaFlexVit) else model, name) for name in _PREFIX]
    given = [t[0] for t in tokens if t is not None]
    if isinstance(model, NaFlexVit):
        high, wide = embed.patch_size  # of a patch [P, P, in_chans], where the engine reads [in_chans, P, P]
        weight = weight.reshape(len(weight), high, wide, embed.in_chans).permute(0, 3, 1, 2).flatten(1)
    found = positions_of(model, grid_of(model))
    of_prefix = found.pop("of prefix", None)
    if given:
        prefix = torch.cat(given)
        found["prefix"] = _normed(model.norm_pre, prefix if of_prefix is None else prefix + of_prefix)
    return found | _named("patch_embed.proj", (weight, bias))


def positions_of(model: Any, grid: tuple[int, int]) -> dict[str, Tensor]:
    """What of the tensors depends on the grid of patches: positions and rotary, where the model has them; and the
    positions "of prefix", of the tokens before the patches, which are the same for every grid."""
    naflex = isinstance(model, NaFlexVit)
    found: dict[str, Tensor] = {}
    if _value(model.patch_embed if naflex else model, "pos_embed") is not None:  # pruned ones are made anew
        table = model.patch_embed.positions(grid) if naflex else model._positions(grid)
        table, rows = table[0].detach().to("cpu", torch.float32), 0
        if not naflex and not model.no_embed_class:
            rows = model.num_prefix_tokens
            found["of prefix"] = table[:rows]
        found["positions"] = table[rows:]
    if getattr(model, "rope", None) is not None:
        found["rotary"] = _rotary(model, grid)
    return found


_PREFIX = ("cls_token", "dist_token", "reg_token")


def grid_of(model: Any) -> tuple[int, int]:
    """Rows and columns of patches of images of the model's own size."""
    embed: Any = model.patch_embed
    return embed._grid(*embed.img_size) if embed.dynamic_img_size else embed.grid_size


def _normed(module: Any, x: Tensor) -> Tensor:
    if not isinstance(module, NORMS):
        return x
    weight = _value(module, "weight")
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, x.shape[-1:], weight, module.eps)
    return F.layer_norm(x, x.shape[-1:], weight, _value(module, "bias"), module.eps)


def _rotary(model: Any, grid: tuple[int, int]) -> Tensor:
    """Sines and cosines [patches, 2 D], or [depth, heads, patches, 2 D], not disturbed as in training."""
    rope, training = model.rope, model.rope.training
    rope.training = False
    try:
        return rope.get_embed(grid if model.dynamic_img_size else None).detach().to("cpu", torch.float32)
    finally:
        rope.training = training


def _block(path: str, block: Any) -> dict[str, Tensor]:
    attn, mlp = block.attn, block.mlp
    tensors: dict[str, Tensor] = {}
    for name, module in (("norm1", block.norm1), ("norm2", block.norm2), ("attn.norm", attn.norm)):
        tensors |= _norm(f"{path}.{name}", module)
    for name, module in (("attn.q_norm", attn.q_norm), ("attn.k_norm", attn.k_norm), ("mlp.norm", mlp.norm)):
        tensors |= _norm(f"{path}.{name}", module)
    tensors |= _named(f"{path}.attn.qkv", _qkv(attn))
    fc1 = _joined(mlp.fc1_g, mlp.fc1_x) if isinstance(mlp, SwiGLU) else _layer(mlp.fc1)
    tensors |= _named(f"{path}.mlp.fc1", fc1)
    for name, layer, branch in (("attn.proj", attn.proj, 1), ("mlp.fc2", mlp.fc2, 2)):
        weight, bias = _layer(layer)
        gamma = _scale(block, branch)
        if gamma is not None:
            weight, bias = weight * gamma[:, None], bias * gamma
        tensors |= _named(f"{path}.{name}", (weight, bias))
    return tensors


def _scale(block: Any, branch: int) -> Tensor | None:
    """The layer scale of a block's first or second branch."""
    module = block._modules.get(f"ls{branch}")
    if isinstance(module, LayerScale):
        return _value(module, "gamma")
    return _value(block, f"gamma_{branch}") if hasattr(block, f"gamma_{branch}") else None


def _joined(*layers: Any) -> tuple[Tensor, Tensor]:
    """Layers that read the same as one."""
    parts = [_layer(layer) for layer in layers]
    return torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])


def _qkv(attn: Any) -> tuple[Tensor, Tensor]:
    if attn.qkv is None:
        return _joined(attn.q_proj, attn.k_proj, attn.v_proj)
    weight, bias = _layer(attn.qkv)
    if isinstance(attn, EvaAttention):
        biases = [_value(attn, name) for name in ("q_bias", "k_bias", "v_bias")]
        if all(b is not None for b in biases):
            bias = torch.cat([b for b in biases if b is not None])
    return weight, bias


def _head(model: Any) -> dict[str, Tensor]:
    if not isinstance(model.head, nn.Linear):
        return {}
    weight, bias = _layer(model.head)
    if isinstance(model, VisionTransformerDistilled):  # the mean of two heads, each of its own token
        other, more = _layer(model.head_dist)
        weight, bias = torch.cat([weight, other], dim=1) / 2, (bias + more) / 2
    return _named("head", (weight, bias))


def _attention_pool(pool: Any) -> dict[str, Tensor]:
    heads = pool.num_heads
    latent = _value(pool, "latent")
    assert latent is not None
    (kv, kv_bias), (q, q_bias) = _layer(pool.kv), _layer(pool.q)
    query = latent.double().flatten() @ q.double().T + q_bias  # [C]
    keys, values = kv.unflatten(0, (2, heads, -1))  # [H, D, C]
    scores = torch.einsum("hd,hdc->hc", query.unflatten(0, (heads, -1)), keys.double()) * pool.head_dim**-0.5
    tensors = {"attn_pool.keys": scores.float()} | _norm("attn_pool.norm", pool.norm)
    biases = kv_bias.unflatten(0, (2, heads, -1))[1]
    for h in range(heads):
        tensors |= _named(f"attn_pool.values.{h}", (values[h].contiguous(), biases[h].contiguous()))
    for name, layer in (("proj", pool.proj), ("mlp.fc1", pool.mlp.fc1), ("mlp.fc2", pool.mlp.fc2)):
        tensors |= _named(f"attn_pool.{name}", _layer(layer))
    return tensors
