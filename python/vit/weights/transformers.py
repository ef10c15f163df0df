"""The layout of Hugging Face transformers' ViTModel and ViTForImageClassification: q, k and v kept apart.

Two sets of names: the hub's files have `encoder.layer.N.attention.attention.query`, models of transformers 5 in
memory `layers.N.attention.q_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MARK = "embeddings.patch_embeddings.projection.weight"

_STEM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
}
_LAYER = {
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = (
    tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    tuple(f"attention.{part}_proj" for part in "qkv"),
)
_NAME = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")

#: Parts that are not read -> why.
BESIDE = {
    "pooler": "transformers' pooler, which no class depends on",
    "embeddings.mask_token": "for pretraining by masked images",
    "decoder": "for pretraining by masked images",
}


def recognises(state: Mapping[str, Any]) -> bool:
    return any(key in (MARK, f"vit.{MARK}") for key in state)


def select(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters without the prefix "vit.", and what else there is -> why it is left out."""
    inside = {key.removeprefix("vit."): value for key, value in state.items()}
    dropped = {key: why for key in inside for part, why in BESIDE.items() if key == part or key.startswith(f"{part}.")}
    return {key: value for key, value in inside.items() if key not in dropped}, dropped


def convert(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """transformers' names -> timm's; what is unknown keeps its name and is reported. transformers' norms add 1e-12."""
    found = {}
    for key, value in state.items():
        layer = _NAME.fullmatch(key)
        if key in _STEM:
            found[_STEM[key]] = value
        elif layer is None:
            found[key] = value
        else:
            index, module, kind = layer.groups()
            names = next((names for names in _QKV if module in names), None)
            if names is None:
                name = f"blocks.{index}.{_LAYER[module]}.{kind}" if module in _LAYER else key
                found[name] = value
            elif module == names[0]:
                parts = [state[key.replace(names[0], name)] for name in names]
                found[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
            elif key.replace(module, names[0]) not in state:
                found[key] = value
    return found, {"norm_eps": 1e-12}, {}
