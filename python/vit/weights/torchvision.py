"""The layout of torchvision.models.vit_*: same tensors, other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_STEM = {
    "class_token": "cls_token",
    "conv_proj.weight": "patch_embed.proj.weight",
    "conv_proj.bias": "patch_embed.proj.bias",
    "encoder.pos_embedding": "pos_embed",
    "encoder.ln.weight": "norm.weight",
    "encoder.ln.bias": "norm.bias",
    "heads.head.weight": "head.weight",
    "heads.head.bias": "head.bias",
}
_LAYER = {
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "self_attention.in_proj_weight": "attn.qkv.weight",
    "self_attention.in_proj_bias": "attn.qkv.bias",
    "self_attention.out_proj.weight": "attn.proj.weight",
    "self_attention.out_proj.bias": "attn.proj.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "mlp.0.weight": "mlp.fc1.weight",
    "mlp.0.bias": "mlp.fc1.bias",
    "mlp.3.weight": "mlp.fc2.weight",
    "mlp.3.bias": "mlp.fc2.bias",
    "mlp.linear_1.weight": "mlp.fc1.weight",
    "mlp.linear_1.bias": "mlp.fc1.bias",
    "mlp.linear_2.weight": "mlp.fc2.weight",
    "mlp.linear_2.bias": "mlp.fc2.bias",
}
MARK = "conv_proj.weight"
_BLOCK = "encoder.layers.encoder_layer_"


def recognises(state: Mapping[str, Any]) -> bool:
    return MARK in state and "encoder.pos_embedding" in state


def select(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """All of it belongs to the model."""
    return dict(state), {}


def convert(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """torchvision's names -> timm's; what is unknown keeps its name and is reported as unexpected."""
    found = {}
    for key, value in state.items():
        if key.startswith(_BLOCK):
            index, _, rest = key.removeprefix(_BLOCK).partition(".")
            found[f"blocks.{index}.{_LAYER.get(rest, rest)}"] = value
        else:
            found[_STEM.get(key, key)] = value
    return found, {}, {}
