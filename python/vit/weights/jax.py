"""The .npz layout of the original JAX code and of big_vision: convolution and dense kernels stored
input-first.

Sources: github.com/google-research/vision_transformer (vit_jax/models_vit.py) and google-research/big_vision
(big_vision/models/vit.py), whose parameter names are converted here. Both normalise the tokens before they take the
class token or the mean: an archive without `cls` is a model with global_pool="avg", fc_norm=False.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: Optimizer states and big_vision checkpoints keep the parameters below one of these.
PREFIXES = ("opt/target/", "params/img/", "params/", "img/", "")
MARK = "embedding/kernel"

#: What stands beside the parameters, and why it is left out.
BESIDE = (
    ("opt/", "state of the optimizer"),
    ("params/txt/", "the text tower"),
    ("txt/", "the text tower"),
    ("params/t", "scale of a contrastive loss"),
    ("params/b", "bias of a contrastive loss"),
    ("extra/", "counters of the training"),
)
POSITIONS = ("Transformer/posembed_input/pos_embedding", "pos_embedding")


def recognises(state: Mapping[str, Any]) -> bool:
    return any(prefix + MARK in state for prefix in PREFIXES)


def select(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters without their prefix, and what else stands in the archive -> why it is left out."""
    prefix = next(prefix for prefix in PREFIXES if prefix + MARK in state)
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    dropped = {}
    for key in state:
        why = next((why for start, why in BESIDE if key == start or (start[-1] == "/" and key.startswith(start))), None)
        if not key.startswith(prefix):
            if why is None:
                inside[key] = state[key]  # reported as unexpected
            else:
                dropped[key] = why
    return inside, dropped


def convert(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """JAX names and shapes -> timm's; arguments that the archive implies; what is left out -> why.

    A name that is not known keeps its name and is reported as unexpected.
    """
    left = _unstack(state)
    dropped = _drop_representation(left)
    dim = left[MARK].shape[-1]
    found = {
        "patch_embed.proj.weight": left.pop(MARK).permute(3, 2, 0, 1).contiguous(),  # HWIO -> OIHW
        "patch_embed.proj.bias": left.pop("embedding/bias"),
    }
    if "cls" in left:
        found["cls_token"] = left.pop("cls")
    implied: dict[str, Any] = {}
    key = next((key for key in POSITIONS if key in left), None)
    if key is not None:
        found["pos_embed"] = _positions(left.pop(key), "cls_token" in found, key == POSITIONS[1])
    else:
        # big_vision computes fixed positions and stores none; the original has learned ones or none.
        original = any("MultiHeadDotProductAttention_1/" in name for name in left)
        implied["pos_embed"] = "none" if original else "sincos2d"
    found |= _norm(left, "Transformer/encoder_norm", "norm")
    if "head/kernel" in left:
        found |= _dense(left, "head", "head")
    for i in range(_depth(left)):
        found |= _block(left, f"Transformer/encoderblock_{i}", f"blocks.{i}", dim)
    return found | left, implied, dropped


def _drop_representation(state: dict[str, Tensor]) -> dict[str, str]:
    """Takes pre_logits, a layer that timm's models lack, out together with the head behind it."""
    keys = [key for key in state if key.startswith("pre_logits/")]
    if not keys:
        return {}
    head = [key for key in ("head/kernel", "head/bias") if key in state]
    used = any(bool(state[key].any()) for key in head)
    for key in keys + head:
        del state[key]
    why = "a layer before the head that this model does not have"
    dropped = dict.fromkeys(keys, why)
    return dropped | dict.fromkeys(head, "the head behind pre_logits" if used else "a head of zeros")


def _positions(table: Tensor, class_token: bool, of_patches: bool) -> Tensor:
    """Positions with a row for the class token. big_vision puts that token before the patches after these have their
    positions, so that its table has rows for patches alone: the class token's is then zero.
    """
    rows = table.shape[1]
    whole = math.isqrt(rows) ** 2 == rows, math.isqrt(max(rows - 1, 0)) ** 2 == rows - 1
    missing = class_token and ((whole[0] and not whole[1]) or (of_patches and whole[0] == whole[1]))
    return torch.cat([table.new_zeros(table.shape[0], 1, table.shape[2]), table], dim=1) if missing else table


def _depth(state: Mapping[str, Tensor]) -> int:
    return len({key.split("/")[1] for key in state if key.startswith("Transformer/encoderblock_")})


def _unstack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """big_vision's scanned models keep all blocks in one array: [depth, ...] -> one entry per block."""
    stacked = "Transformer/encoderblock/"
    result = {key: value for key, value in state.items() if not key.startswith(stacked)}
    arrays = {key.removeprefix(stacked): value for key, value in state.items() if key.startswith(stacked)}
    depths = {len(value) if value.ndim else 0 for value in arrays.values()}
    if len(depths) > 1:
        raise RuntimeError(f"encoderblock/* have {', '.join(map(str, sorted(depths)))} blocks")
    for rest, value in arrays.items():
        result |= {f"Transformer/encoderblock_{i}/{rest}": part for i, part in enumerate(value)}
    return result


def _block(state: dict[str, Tensor], source: str, target: str, dim: int) -> dict[str, Tensor]:
    # The original counts across kinds (LayerNorm_0, Attention_1, LayerNorm_2, Mlp_3), big_vision per kind.
    original = f"{source}/MultiHeadDotProductAttention_1/query/kernel" in state
    attention, mlp, norm2 = (1, 3, 2) if original else (0, 0, 1)
    attn = f"{source}/MultiHeadDotProductAttention_{attention}"
    qkv = ("query", "key", "value")
    found = {
        f"{target}.attn.qkv.weight": torch.cat([state.pop(f"{attn}/{p}/kernel").reshape(dim, dim).T for p in qkv]),
        f"{target}.attn.qkv.bias": torch.cat([state.pop(f"{attn}/{p}/bias").reshape(dim) for p in qkv]),
        f"{target}.attn.proj.weight": state.pop(f"{attn}/out/kernel").reshape(dim, dim).T.contiguous(),
        f"{target}.attn.proj.bias": state.pop(f"{attn}/out/bias"),
    }
    found |= _norm(state, f"{source}/LayerNorm_0", f"{target}.norm1")
    found |= _norm(state, f"{source}/LayerNorm_{norm2}", f"{target}.norm2")
    found |= _dense(state, f"{source}/MlpBlock_{mlp}/Dense_0", f"{target}.mlp.fc1")
    return found | _dense(state, f"{source}/MlpBlock_{mlp}/Dense_1", f"{target}.mlp.fc2")


def _norm(state: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {f"{target}.weight": state.pop(f"{source}/scale"), f"{target}.bias": state.pop(f"{source}/bias")}


def _dense(state: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    kernel = state.pop(f"{source}/kernel")
    if kernel.ndim != 2:
        raise RuntimeError(f"{source}/kernel is {list(kernel.shape)}, not [inputs, outputs]")
    return {f"{target}.weight": kernel.T.contiguous(), f"{target}.bias": state.pop(f"{source}/bias")}
