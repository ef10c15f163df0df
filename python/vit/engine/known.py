"""The modules and tensors of the networks that the engine computes: what may stand at each path of a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..model.attention_rope import AttentionRope, EvaAttention
from ..model.blocks import Attention, Block
from ..model.deit import VisionTransformerDistilled
from ..model.eva import Eva, PatchDropoutWithIndices
from ..model.eva_blocks import EvaBlock
from ..model.layers import DropPath, LayerScale, PatchDropout, PatchEmbed, QuickGELU
from ..model.mlp import GluMlp, Mlp, SwiGLU
from ..model.naflex import NaFlexEmbeds, NaFlexVit
from ..model.pool import AttentionPoolLatent
from ..model.rope import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from ..model.vision_transformer import VisionTransformer

Shape = tuple[int, ...]
Kinds = tuple[type[Any], ...]

NORMS: Kinds = (nn.LayerNorm, nn.RMSNorm)
_ABSENT = type(None)
_LINEAR: Kinds = (nn.Linear,)
_NOTHING: Kinds = (nn.Identity,)
_MAYBE_NORM: Kinds = (nn.Identity, *NORMS)
#: What does nothing in evaluation mode.
_DROP: Kinds = (nn.Dropout, nn.Identity, DropPath, PatchDropout, PatchDropoutWithIndices)

_ROTARY: Kinds = (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed)

#: The classes of models.
MODELS: Kinds = (VisionTransformer, VisionTransformerDistilled, Eva, NaFlexVit)

#: path -> the classes it may have: where images become tokens, behind the blocks, and in pooling by attention.
_TOP: dict[str, Kinds] = {
    "patch_drop": (*_DROP, _ABSENT),
    "norm_pre": _MAYBE_NORM,
    "norm": (*NORMS, nn.Identity),
    "fc_norm": (*NORMS, nn.Identity),
    "attn_pool": (AttentionPoolLatent, _ABSENT),
    "head_drop": _DROP,
    "head": (nn.Linear, nn.Identity),
}
_PATCHES: dict[str, Kinds] = {
    "patch_embed": (PatchEmbed,),
    "patch_embed.proj": (nn.Conv2d, nn.Linear),
    "patch_embed.norm": _MAYBE_NORM,
    "pos_drop": _DROP,
}
_NAFLEX: dict[str, Kinds] = {
    "embeds": (NaFlexEmbeds,),
    "embeds.proj": _LINEAR,
    "embeds.norm": _NOTHING,
    "embeds.pos_drop": _DROP,
}
_POOL: dict[str, Kinds] = {
    **{f"attn_pool.{name}": _LINEAR for name in ("q", "kv", "proj")},
    **{f"attn_pool.{name}": _NOTHING for name in ("q_norm", "k_norm")},
    "attn_pool.proj_drop": _DROP,
    "attn_pool.norm": NORMS,
    "attn_pool.mlp": (Mlp,),
}

#: The same of blocks, below their own path.
_BLOCK: dict[str, Kinds] = {
    "": (Block,),
    ".norm1": NORMS,
    ".attn": (Attention,),
    ".ls1": (nn.Identity, LayerScale),
    ".drop_path1": _DROP,
    ".norm2": NORMS,
    ".mlp": (Mlp, GluMlp, SwiGLU),
    ".ls2": (nn.Identity, LayerScale),
    ".drop_path2": _DROP,
}
_EVA_BLOCK: dict[str, Kinds] = {
    "": (EvaBlock,),
    ".norm1": NORMS,
    ".attn": (EvaAttention, AttentionRope),
    ".drop_path1": _DROP,
    ".norm2": NORMS,
    ".mlp": (Mlp, GluMlp, SwiGLU),
    ".drop_path2": _DROP,
}
_ATTENTION: dict[str, Kinds] = {
    **dict.fromkeys((".q_norm", ".k_norm", ".norm"), _MAYBE_NORM),
    ".attn_drop": _DROP,
    ".proj": _LINEAR,
    ".proj_drop": _DROP,
}


def kinds_of(model: Any, modules: dict[str, Any]) -> dict[str, Kinds]:
    """path -> the classes of module that it may have in a model of this class with these parts."""
    kind = type_before_parametrizations(model)
    eva, naflex = issubclass(kind, Eva), issubclass(kind, NaFlexVit)
    known: dict[str, Kinds] = {"": (kind,)} | (_NAFLEX if naflex else _PATCHES) | _TOP
    if eva:
        known |= {"blocks": (nn.ModuleList,), "rope": (*_ROTARY, _ABSENT)}
    else:
        known |= {"blocks": (nn.Sequential,)}
    if issubclass(kind, VisionTransformerDistilled):
        known |= {"head_dist": (nn.Linear, nn.Identity)}
    if isinstance(modules.get("attn_pool"), AttentionPoolLatent):
        known |= _POOL | _mlp("attn_pool.mlp", Mlp, _NOTHING)
    blocks = modules.get("blocks")
    for i in blocks._modules if isinstance(blocks, known["blocks"]) else ():
        known |= {f"blocks.{i}{path}": kinds for path, kinds in (_EVA_BLOCK if eva else _BLOCK).items()}
        split = getattr(modules.get(f"blocks.{i}.attn"), "q_proj", None) is not None
        projections = ("q_proj", "k_proj", "v_proj") if split else ("qkv",)
        known |= {f"blocks.{i}.attn{path}": kinds for path, kinds in _ATTENTION.items()}
        known |= {f"blocks.{i}.attn.{name}": _LINEAR for name in projections}
        known |= _mlp(f"blocks.{i}.mlp", type(modules.get(f"blocks.{i}.mlp")), _MAYBE_NORM)
    return known


def _mlp(path: str, kind: type, inner: Kinds) -> dict[str, Kinds]:
    layers = ("fc1_g", "fc1_x", "fc2") if issubclass(kind, SwiGLU) else ("fc1", "fc2")
    known = {f"{path}.{name}": _LINEAR for name in layers} | {f"{path}.{name}": _DROP for name in ("drop1", "drop2")}
    return known | {f"{path}.act": (nn.GELU, QuickGELU, nn.SiLU), f"{path}.norm": inner}


def mlp_width(mlp: Any) -> int:
    """How many numbers the second layer of an MLP reads."""
    return mlp.fc2.in_features


def shapes_of(modules: dict[str, Any]) -> dict[str, dict[str, Shape]]:
    """path -> the tensors a module must have and their shapes; biases of linear layers may be absent."""
    model, embed, head = modules[""], modules[""].patch_embed, modules["head"]
    C, rows = model.embed_dim, int(model.cls_token is not None) + model.num_reg_tokens
    rows += int(isinstance(model, VisionTransformerDistilled))

    def layer(inputs: int, outputs: int) -> dict[str, Shape]:
        return {"weight": (outputs, inputs), "bias": (outputs,)}

    shapes: dict[str, dict[str, Shape]] = {}
    for path in ("patch_embed.norm", "norm_pre", "norm", "fc_norm"):
        shapes[path] = _norm(modules.get(path), C)
    for i in modules["blocks"]._modules:
        shapes |= _shapes_of_block(f"blocks.{i}", modules, C)
    patches = embed.num_patches
    tokens: dict[str, Shape] = {"cls_token": (1, 1, C)} if model.cls_token is not None else {}
    if model.num_reg_tokens:
        tokens["reg_token"] = (1, model.num_reg_tokens, C)
    if isinstance(model, VisionTransformerDistilled):
        tokens["dist_token"] = (1, 1, C)
        if isinstance(head, nn.Linear):
            shapes["head_dist"] = layer(C, head.out_features)
    if isinstance(head, nn.Linear):
        shapes["head"] = layer(C, head.out_features)
    if isinstance(model, NaFlexVit):
        if embed.pos_embed is not None:
            tokens["pos_embed"] = (1, *embed.pos_embed.shape[1:3], C)
        shapes |= {"": {}, "embeds": tokens, "embeds.proj": layer(embed.patch_values, C)}
    else:
        if model.pos_embed is not None:
            tokens["pos_embed"] = (1, (0 if model.no_embed_class else rows) + patches, C)
        shapes |= {"": tokens, "patch_embed.proj": layer(embed.patch_values, C)}
        if isinstance(embed.proj, nn.Conv2d):
            shapes["patch_embed.proj"]["weight"] = (C, embed.in_chans, *embed.patch_size)
    if (rope := modules.get("rope")) is not None:  # made anew where it is used: only their names are looked at
        shapes["rope"] = {name: tuple(t.shape) for name, t in (*rope.named_buffers(), *rope.named_parameters())}
    if (pool := modules.get("attn_pool")) is not None:
        hidden = mlp_width(pool.mlp)
        shapes |= {"attn_pool": {"latent": (1, 1, C)}, "attn_pool.norm": _norm(pool.norm, C)}
        shapes |= {"attn_pool.q": layer(C, C), "attn_pool.kv": layer(C, 2 * C), "attn_pool.proj": layer(C, C)}
        shapes |= {"attn_pool.mlp.fc1": layer(C, hidden), "attn_pool.mlp.fc2": layer(hidden, C)}
    return shapes


def _shapes_of_block(path: str, modules: dict[str, Any], C: int) -> dict[str, dict[str, Shape]]:
    block: Any = modules[path]
    shapes: dict[str, dict[str, Shape]] = {}
    attn, mlp, hidden = block.attn, block.mlp, mlp_width(block.mlp)

    def layer(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{path}.{name}"] = {"weight": (outputs, inputs), "bias": (outputs,)}

    for name in ("norm1", "norm2", "attn.norm"):
        shapes[f"{path}.{name}"] = _norm(modules[f"{path}.{name}"], C)
    for name in ("attn.q_norm", "attn.k_norm"):
        shapes[f"{path}.{name}"] = _norm(modules[f"{path}.{name}"], C // attn.num_heads)
    shapes[f"{path}.mlp.norm"] = _norm(mlp.norm, hidden)
    if f"{path}.attn.qkv" in modules:
        layer("attn.qkv", C, 3 * C)
    else:
        for name in ("q_proj", "k_proj", "v_proj"):
            layer(f"attn.{name}", C, C)
    layer("attn.proj", C, C)
    for name in ("fc1_g", "fc1_x") if isinstance(mlp, SwiGLU) else ("fc1",):
        layer(f"mlp.{name}", C, 2 * hidden if isinstance(mlp, GluMlp) else hidden)
    layer("mlp.fc2", hidden, C)
    for name in ("ls1", "ls2"):
        if isinstance(modules.get(f"{path}.{name}"), LayerScale):
            shapes[f"{path}.{name}"] = {"gamma": (C,)}
    if isinstance(block, EvaBlock):
        shapes[path] = {name: (C,) for name in ("gamma_1", "gamma_2") if getattr(block, name) is not None}
    if isinstance(attn, EvaAttention) and attn.q_bias is not None:
        shapes[f"{path}.attn"] = dict.fromkeys(("q_bias", "k_bias", "v_bias"), (C,))
    return shapes


def _norm(module: Any, width: int) -> dict[str, Shape]:
    if not isinstance(module, NORMS):
        return {}
    names = ("weight", "bias") if isinstance(module, nn.LayerNorm) else ("weight",)
    return dict.fromkeys(names, (width,))
