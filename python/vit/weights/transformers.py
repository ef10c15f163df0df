"""The layout of Hugging Face transformers' ViTModel and ViTForImageClassification: q, k and v kept apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
}


#: transformers' names of sizes -> ours.
_SIZES = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "layer_norm_eps": "norm_eps",
    "qkv_bias": "qkv_bias",
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def about(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What transformers' config.json says of a ViT; None for other models. Their images are resized without a
    crop, which Preprocess does not do: the named model's transform stays."""
    if config.get("model_type") != "vit":
        return None
    arch = {ours: config[theirs] for theirs, ours in _SIZES.items() if theirs in config}
    if "intermediate_size" in config:
        arch["mlp_ratio"] = config["intermediate_size"] / config["hidden_size"]
    if config.get("hidden_act") in _ACTIVATIONS:
        arch["act_layer"] = _ACTIVATIONS[config["hidden_act"]]
    names = [label for _, label in sorted((config.get("id2label") or {}).items(), key=lambda item: int(item[0]))]
    return {"arch": arch, "class_names": tuple(names) or None}


def recognises(state: Mapping[str, Tensor]) -> bool:
    return any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> timm's. The pooler is left out; what else is unknown keeps its name and is
    reported."""
    state = {
        key.removeprefix("vit."): value for key, value in state.items() if not key.startswith(("pooler", "vit.pooler"))
    }
    found = {}
    for key, value in state.items():
        if key in _STEM:
            found[_STEM[key]] = value
        elif key.startswith("encoder.layer."):
            _, _, index, rest = key.split(".", 3)
            module, _, kind = rest.rpartition(".")
            if module == "attention.attention.query":
                parts = [state[key.replace(".query.", f".{p}.")] for p in ("query", "key", "value")]
                found[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
            elif module not in ("attention.attention.key", "attention.attention.value"):
                found[f"blocks.{index}.{_LAYER.get(module, module)}.{kind}"] = value
        else:
            found[key] = value
    return found
