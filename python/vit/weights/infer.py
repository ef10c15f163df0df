"""What tensors under timm's names tell of their model, where neither a caller nor a record beside them names it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..model.configs import get_config, list_models

PATCHES = "patch_embed.proj.weight"


def options(state: Mapping[str, Tensor], eva: bool | None = None) -> dict[str, Any]:
    """Arguments of VisionTransformer, or of Eva, that follow from names and shapes; the number of heads does not.
    eva: which of the two it is, where that is known."""
    patches = state.get(PATCHES)
    if patches is None or patches.ndim != 4 or "blocks.0.norm1.weight" not in state:
        return {}
    dim, eva = len(patches), is_eva(state) if eva is None else eva
    found: dict[str, Any] = {
        "embed_dim": dim,
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "patch_size": tuple(patches.shape[2:]),
        "in_chans": patches.shape[1],
        "class_token": "cls_token" in state,
    }
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    found["num_reg_tokens" if eva else "reg_tokens"] = registers
    found |= _mlp(state, dim, eva) | _positions(state, found["class_token"] + registers + ("dist_token" in state))
    if "attn_pool.latent" in state:
        found["global_pool"] = "map"
    if _has(state, "ls1.gamma", "gamma_1"):
        found["init_values"] = 1e-5
    return found | (_eva(state) if eva else _vit(state))


def is_eva(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of timm's Eva and not of its VisionTransformer."""
    split = _has(state, "attn.q_bias", "attn.q_proj.weight") or "rope.freqs" in state
    gates = _has(state, "mlp.fc1_g.bias")
    return split or gates or (_has(state, "gamma_1") and ("norm_pre.weight" in state or "pos_embed" not in state))


def _has(state: Mapping[str, Tensor], *names: str) -> bool:
    return any(f"blocks.0.{name}" in state for name in names)


def _mlp(state: Mapping[str, Tensor], dim: int, eva: bool) -> dict[str, Any]:
    first = next((state[f"blocks.0.mlp.{n}.weight"] for n in ("fc1", "fc1_g") if _has(state, f"mlp.{n}.weight")), None)
    second = state.get("blocks.0.mlp.fc2.weight")
    if first is None or second is None:
        return {}
    packed = len(first) == 2 * second.shape[1]
    hidden = second.shape[1] if eva and packed else len(first)
    plain = hidden / dim
    found: dict[str, Any] = {"mlp_ratio": plain if int(dim * plain) == hidden else math.nextafter(plain, math.inf)}
    gated = packed or _has(state, "mlp.fc1_g.weight")
    if gated and eva:
        found |= {"swiglu_mlp": True}
    elif gated:
        found |= {"mlp_layer": "swiglu_packed" if packed else "swiglu", "act_layer": "silu"}
    return found


def _positions(state: Mapping[str, Tensor], prefix: int) -> dict[str, Any]:
    table = state.get("pos_embed")
    if table is None or table.ndim != 3:
        return {}
    rows, patch = table.shape[1], state[PATCHES].shape[2:]
    for first in dict.fromkeys((prefix, 0)):
        side = math.isqrt(max(rows - first, 0))
        if side**2 == rows - first and side:
            found: dict[str, Any] = {"img_size": (side * patch[0], side * patch[1])}
            return found | ({"no_embed_class": True} if prefix and not first else {})
    return {}


def _vit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "qkv_bias": _has(state, "attn.qkv.bias"),
        "proj_bias": _has(state, "attn.proj.bias"),
        "pre_norm": "norm_pre.weight" in state,
        "qk_norm": _has(state, "attn.q_norm.weight"),
        "scale_attn_norm": _has(state, "attn.norm.weight"),
        "scale_mlp_norm": _has(state, "mlp.norm.weight"),
        "norm_layer": "layernorm" if _has(state, "norm1.bias") else "rmsnorm",
        "final_norm": "norm.weight" in state or "fc_norm.weight" in state,
    }
    if "patch_embed.norm.weight" in state:
        found["embed_norm_layer"] = "layernorm" if "patch_embed.norm.bias" in state else "rmsnorm"
    if "pos_embed" not in state:
        found["pos_embed"] = "none"
    if "pre_logits.fc.weight" in state:
        found["representation_size"] = len(state["pre_logits.fc.weight"])
    return found


def _eva(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "qkv_bias": _has(state, "attn.q_bias", "attn.q_proj.bias", "attn.qkv.bias"),
        "qkv_fused": not _has(state, "attn.q_proj.weight"),
        "scale_attn_inner": _has(state, "attn.norm.weight"),
        "scale_mlp": _has(state, "mlp.norm.weight"),
        "use_abs_pos_emb": "pos_embed" in state,
        "use_pre_transformer_norm": "norm_pre.weight" in state,
    }


def nearest_model(found: Mapping[str, Any], base: str) -> str | None:
    """The named model of these sizes whose name is most like `base`: of CLIP's tower of width 1024 CLIP-L, not AIMv2-L.

    None where no named model has these sizes, so that nothing tells the number of heads.
    """
    sizes = {key: found[key] for key in ("embed_dim", "depth") if key in found}
    if not sizes:
        return None
    defaults = {"embed_dim": 768, "depth": 12, "patch_size": 16}

    def agrees(name: str, keys: Mapping[str, Any]) -> bool:
        arch = defaults | dict(get_config(name).arch)
        return all(_one(arch[key]) == _one(value) for key, value in keys.items())

    fitting = [name for name in list_models() if agrees(name, sizes)]
    with_patch = [name for name in fitting if agrees(name, {"patch_size": found.get("patch_size", 16)})]
    likeness = {name: difflib.SequenceMatcher(None, name, base).ratio() for name in with_patch or fitting}
    return max(likeness, key=lambda name: likeness[name], default=None)


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) and len(set(value)) == 1 else value
