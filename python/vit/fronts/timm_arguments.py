"""The arguments of a live model of timm, read from its modules."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..weights import WeightsError, infer

#: (module, class) of timm's models -> their kind here.
CLASSES = {
    ("timm.models.vision_transformer", "VisionTransformer"): "vit",
    ("timm.models.deit", "VisionTransformerDistilled"): "deit",
    ("timm.models.eva", "Eva"): "eva",
    ("timm.models.naflexvit", "NaFlexVit"): "naflex",
}


def _rate(module: Any) -> float:
    return float(getattr(module, "p", 0.0))


def _norm(module: Any) -> Any:
    """The class of a norm as an argument of timm's models."""
    kind: Any = type(module)
    return functools.partial(kind, eps=module.eps)


def _activation(module: Any) -> Any:
    """The class of an activation as an argument of timm's models."""
    told = {"approximate": module.approximate} if hasattr(module, "approximate") else {}
    kind: Any = type(module)
    return functools.partial(kind, **told)


def _common(model: Any) -> dict[str, Any]:
    """What all of timm's classes have, under the names of VisionTransformer."""
    first = model.blocks[0]
    return {
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "num_heads": first.attn.num_heads,
        "drop_rate": _rate(model.head_drop),
        "patch_drop_rate": float(getattr(model.patch_drop, "prob", 0.0)),
        "proj_drop_rate": _rate(first.attn.proj_drop),
        "attn_drop_rate": _rate(first.attn.attn_drop),
        "drop_path_rate": float(getattr(model.blocks[-1].drop_path1, "drop_prob", 0.0)),
        "norm_layer": _norm(first.norm1),
    }


def _embedding(model: Any) -> dict[str, Any]:
    """What the tensors tell, and what stands before the blocks of a model of one size."""
    patches = model.patch_embed
    return infer.options(dict(model.state_dict()), eva=type(model).__name__ == "Eva") | {
        "img_size": tuple(patches.img_size or (0, 0)),
        "patch_size": tuple(patches.patch_size),
        "in_chans": patches.proj.in_channels,
        "no_embed_class": model.no_embed_class,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": patches.dynamic_img_pad,
        "pos_drop_rate": _rate(model.pos_drop),
    }


def _blocks(model: Any, embedding: Any) -> dict[str, Any]:
    """What timm's Block has, and the norms around the blocks. embedding: the module that has a norm of patches."""
    first, last_norms = model.blocks[0], (model.norm, model.fc_norm)
    mlp: Any = type(first.mlp)
    found = {
        "reg_tokens": model.num_reg_tokens,
        "class_token": model.has_class_token,
        "pool_include_prefix": getattr(model, "pool_include_prefix", False),
        "final_norm": any(not isinstance(norm, nn.Identity) for norm in last_norms),
        "init_values": getattr(first.ls1, "init_values", None),
        "act_layer": _activation(first.mlp.act),
        "mlp_layer": functools.partial(mlp, gate_last=first.mlp.gate_last) if hasattr(first.mlp, "gate_last") else mlp,
        "fix_init": getattr(model, "fix_init", False),
        "weight_init": "skip",
    }
    if found["final_norm"]:
        found["fc_norm"] = not isinstance(model.fc_norm, nn.Identity)
    if not isinstance(norm := embedding.norm, nn.Identity):
        found["embed_norm_layer"] = _norm(norm)
    return found


def _vit(model: Any) -> dict[str, Any]:
    """The arguments of a VisionTransformer, distilled or not."""
    found = _embedding(model) | _common(model) | _blocks(model, model.patch_embed)
    return found | {"pos_embed": "none" if model.pos_embed is None else "learn"}


def _naflex(model: Any) -> dict[str, Any]:
    """The arguments of a NaFlexVit."""
    embeds, first = model.embeds, model.blocks[0]
    if type(first).__name__ != "Block":
        raise WeightsError(
            f"vit: from_timm: the blocks of the NaFlexVit are {type(first).__name__}s (rope_type, attn_type, "
            "swiglu_mlp); known is Block"
        )
    patch, state = tuple(embeds.patch_size), dict(model.state_dict())
    # What the tensors tell, of a projection in the form of a convolution's.
    state["patch_embed.proj.weight"] = embeds.proj.weight.reshape(-1, embeds.in_chans, *patch)
    found = infer.options(state, eva=False) | {
        "patch_size": patch,
        "in_chans": embeds.in_chans,
        "dynamic_img_pad": embeds.dynamic_img_pad,
        "pos_drop_rate": _rate(embeds.pos_drop),
        "pos_embed": embeds.pos_embed_type,
        "pos_embed_grid_size": embeds.pos_embed_grid_size and tuple(embeds.pos_embed_grid_size),
        "pos_embed_ar_preserving": embeds.pos_embed_ar_preserving,
        "pos_embed_interp_mode": embeds.pos_embed_interp_mode,
        "pos_embed_antialias": embeds.pos_embed_antialias,
        "pos_embed_align_corners": embeds.pos_embed_align_corners,
    }
    found["scale_attn_inner_norm"] = found.pop("scale_attn_norm", False)  # NaFlexVitCfg's name
    grid = found["pos_embed_grid_size"] or (16, 16)
    found["img_size"] = tuple(side * size for side, size in zip(grid, patch, strict=True))
    return found | _common(model) | _blocks(model, embeds) | {"weight_init": ""}  # it knows no "skip"


def _eva(model: Any) -> dict[str, Any]:
    """The arguments of an Eva."""
    first, rope = model.blocks[0], model.rope
    found = (
        _embedding(model)
        | _common(model)
        | {
            "attn_type": "eva" if type(first.attn).__name__ == "EvaAttention" else "rope",
            "init_values": getattr(first, "init_values", None),
            "use_post_norm": type(first).__name__ == "EvaBlockPostNorm",
            "use_post_transformer_norm": not isinstance(model.norm, nn.Identity),
            "use_fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "qk_norm": not isinstance(first.attn.q_norm, nn.Identity),
            "use_rot_pos_emb": rope is not None,
            "head_init_scale": model.head_init_scale,
        }
    )
    if type(first.mlp).__name__ == "SwiGLU" and not found.get("scale_mlp"):
        found["swiglu_align_to"] = 1  # what makes it a gate of its own; the width is that of the weights
    if (pool := model.attn_pool) is not None:
        width = pool.mlp.fc1.out_features / found["embed_dim"]
        found |= {"attn_pool_num_heads": pool.num_heads, "attn_pool_mlp_ratio": width}
    return found if rope is None else found | _rope(rope)


_ROPES = {"RotaryEmbeddingCat": "cat", "RotaryEmbeddingMixed": "mixed", "RotaryEmbeddingDinoV3": "dinov3"}


def _rope(rope: Any) -> dict[str, Any]:
    """The arguments of rotary positions."""
    kind = type(rope).__name__
    if kind not in _ROPES:
        raise WeightsError(f"vit: from_timm: rope is a {kind}; known are {', '.join(_ROPES)}")
    found = {
        "rope_type": _ROPES[kind],
        "rope_temperature": rope.temperature,
        "rope_grid_indexing": rope.grid_indexing,
        "rope_rotate_half": getattr(rope, "rotate_half", False),
        "rope_grid_offset": getattr(rope, "grid_offset", 0.0),
        "ref_feat_shape": getattr(rope, "ref_feat_shape", None),
    }
    for name in ("shift_coords", "jitter_coords", "rescale_coords"):
        found[f"rope_{name}"] = getattr(rope, name, None)
    return found


def twin(kind: Any, arguments: Mapping[str, Any]) -> Any:
    """A model that timm makes of the arguments, as far as its version has them, without memory."""
    known: set[str] = set()
    for one in kind.__mro__:
        if "__init__" in vars(one):
            known |= set(inspect.signature(one.__init__).parameters)
    if (config := getattr(sys.modules[kind.__module__], f"{kind.__name__}Cfg", None)) is not None:  # NaFlexVitCfg
        known |= {field.name for field in dataclasses.fields(config)}
    with torch.device("meta"):
        return kind(**{key: value for key, value in arguments.items() if key in known})


def has_rest(arguments: Mapping[str, Any]) -> bool:
    """Whether pixels beyond the last whole patch are not read."""
    return any(side % size for side, size in zip(arguments["img_size"], arguments["patch_size"], strict=True))


READERS: dict[str, Callable[[Any], dict[str, Any]]] = {"vit": _vit, "deit": _vit, "eva": _eva, "naflex": _naflex}
