"""A model as the engine takes it: sizes, float32 weights under timm's names, texts; or the reasons why not."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import BackendError
from ..model.blocks import Attention, Block, Mlp
from ..model.layers import LayerNorm, Linear, PatchEmbed
from ..model.vision_transformer import VisionTransformer
from ..weights.checkpoint import all_finite
from . import native
from .smooth import LAYERS, natural_image, observe, smooth


@dataclass(frozen=True)
class Frozen:
    """What `vit_engine_build` takes: sizes, weights with the precision each is packed for, texts."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    precisions: dict[str, int]
    texts: dict[str, str]


def freeze(
    model: nn.Module,
    dtype: str,
    calibrate: Tensor | None = None,
    exclude: Collection[str] = (),
    weights: str | None = None,
) -> Frozen:
    """The model's sizes and weights; dropout and drop-path do nothing at inference and are left out.

    For int8 the weights are smoothed, and rounding leaves each layer's mean output where it is: on `calibrate` images,
    or on one of noise. `weights`: how the linear layers of blocks are stored, where it is not dtype. Layers that
    `exclude` names stay bfloat16.

    Raises BackendError with all reasons why the engine cannot run it, ValueError for unknown names.
    """
    check_quantization(dtype, calibrate, exclude, weights)
    if reasons := list(refusals(model)):
        raise BackendError(
            f"vit: the engine cannot run this {type(model).__name__}\n"
            + "\n".join(f"  {reason}" for reason in reasons)
            + "\nUse the model itself, or a vit.VisionTransformer without changed modules."
        )
    assert isinstance(model, VisionTransformer)
    embed = model.patch_embed
    norm: Any = model.norm if isinstance(model.norm, LayerNorm) else model.fc_norm
    tensors: dict[str, Tensor] = {
        "mean": torch.tensor(model.preprocess.mean),
        "std": torch.tensor(model.preprocess.std),
        "patch_embed.proj.weight": embed.proj.weight.flatten(1),
        "norm.weight": norm.weight,
        "norm.bias": norm.bias,
    }
    if embed.proj.bias is not None:
        tensors["patch_embed.proj.bias"] = embed.proj.bias
    prefix = model.num_prefix_tokens
    positions = None if model.pos_embed is None else model.pos_embed[0].float()
    if model.cls_token is not None:
        tensors["prefix"] = model.cls_token[0].float() + (0 if positions is None else positions[:prefix])
    if positions is not None:
        tensors["positions"] = positions[prefix:]
    for name, parameter in model.named_parameters():
        if name.startswith(("blocks.", "head.")):
            tensors[name] = parameter
    layers = check_layers(exclude, len(model.blocks))
    precision = native.STORED[weights] if weights else native.PRECISIONS[dtype]
    kept = native.PRECISIONS["bfloat16"]
    precisions = {f"{layer}.weight": kept if layer in exclude else precision for layer in layers}
    (height, width), (patch_height, patch_width) = embed.img_size, embed.patch_size
    first: Any = model.blocks[0]
    config = {
        "precision": native.PRECISIONS[dtype],
        "pool": native.POOLS[model.global_pool],
        "activation": native.ACTIVATIONS[first.mlp.activation],
        "dynamic_pad": int(embed.dynamic_pad),
        "norm_first": int(norm is model.norm),
        "channels": embed.in_chans,
        "image_height": height,
        "image_width": width,
        "patch_height": patch_height,
        "patch_width": patch_width,
        "prefix_tokens": prefix,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": first.attn.num_heads,
        "mlp_width": first.mlp.fc1.out_features,
        "num_classes": model.num_classes,
        "norm_eps": norm.eps,
    }
    texts = {"name": model.name, "preprocess": json.dumps(model.preprocess.to_dict())}
    if weights:
        texts["weights"] = weights
    if model.class_names is not None:
        texts["class_names"] = json.dumps(list(model.class_names))
    plain = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    if dtype == "int8":
        inputs = observe(model, natural_image(model) if calibrate is None else calibrate)
        plain = smooth(plain, len(model.blocks), inputs)
    return Frozen(config, plain, precisions, texts)


def check_quantization(
    dtype: str, calibrate: Tensor | None, exclude: Collection[str], weights: str | None = None
) -> None:
    """Refuses arguments that belong to another dtype."""
    if weights is not None and weights not in native.STORED:
        raise ValueError(f"vit.Engine: weights {weights!r} is not one of {', '.join(native.STORED)} or None")
    if weights is not None and dtype != "bfloat16":
        raise ValueError(f"vit.Engine: weights={weights!r} belongs to dtype='bfloat16', not {dtype!r}")
    if dtype != "int8" and (calibrate is not None or (exclude and weights is None)):
        raise ValueError(f"vit.Engine: calibrate and exclude belong to dtype='int8', not {dtype!r}")
    if isinstance(exclude, str):
        raise ValueError(f"vit.Engine: exclude must be a collection of names, got the text {exclude!r}")
    if calibrate is not None and not len(calibrate):
        raise ValueError("vit.Engine: calibrate holds no images")


def quantizable(depth: int) -> list[str]:
    """The layers of a network of that depth that int8 quantizes."""
    return [f"blocks.{i}.{layer}" for i in range(depth) for layer in LAYERS]


def check_layers(names: Collection[str], depth: int) -> list[str]:
    """All that int8 quantizes; ValueError when one of the names is none of them."""
    layers = quantizable(depth)
    if unknown := sorted(set(names) - set(layers)):
        raise ValueError(
            f"vit.Engine: {', '.join(unknown)} cannot be excluded; layers that can stay bfloat16 are blocks.I.<layer> "
            f"with I from 0 to {depth - 1} and <layer> one of {', '.join(LAYERS)}"
        )
    return layers


def refusals(model: nn.Module) -> Iterator[str]:
    """Why the engine cannot run a model; nothing when it can."""
    if type(model) is not VisionTransformer:
        yield f"needs a vit.VisionTransformer, got {type(model).__name__}"
        return
    expected: dict[str, tuple[type, ...]] = {
        "patch_embed": (PatchEmbed,),
        "patch_embed.proj": (nn.Conv2d, nn.Linear),
        "norm": (LayerNorm, nn.Identity),
        "fc_norm": (LayerNorm, nn.Identity),
        "head": (Linear, nn.Identity),
    }
    for i in range(len(model.blocks)):
        parts = {"": Block, ".norm1": LayerNorm, ".attn": Attention, ".norm2": LayerNorm, ".mlp": Mlp}
        parts |= {f".{name}": Linear for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
        expected |= {f"blocks.{i}{part}": (kind,) for part, kind in parts.items()}
    modules = dict(model.named_modules())
    for name, kinds in expected.items():
        if type(modules.get(name)) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            yield f"{name} is a {type(modules.get(name)).__name__}; the engine knows {wanted}"
            return
    norms = [module for module in modules.values() if isinstance(module, LayerNorm)]
    if len(norms) != 2 * len(model.blocks) + 1:
        yield "exactly one of norm and fc_norm must be a LayerNorm"
        return
    if any(norm.bias is None for norm in norms):
        yield "a LayerNorm without weight and bias"
    blocks: list[Any] = list(model.blocks)
    alike: dict[str, set[Any]] = {
        "norm eps": {norm.eps for norm in norms},
        "num_heads": {block.attn.num_heads for block in blocks},
        "mlp width": {block.mlp.fc1.out_features for block in blocks},
        "activation": {block.mlp.activation for block in blocks},
    }
    for what, values in alike.items():
        if len(values) > 1:
            yield f"{what} differs from layer to layer: {', '.join(map(str, sorted(values, key=str)))}"
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            yield f"{name} has no values (it is on the meta device)"
            return
        if not all_finite(tensor):
            yield f"{name} holds NaN or infinity"
