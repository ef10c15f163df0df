"""The .npz layout of the original JAX code and of big_vision: convolution and dense kernels stored
input-first.

Sources: github.com/google-research/vision_transformer (vit_jax/models_vit.py) and google-research/big_vision
(big_vision/models/vit.py), whose parameter names are converted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: Optimizer states and big_vision checkpoints keep the parameters below one of these.
PREFIXES = ("opt/target/", "params/img/", "params/", "img/")


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of an archive; ValueError for one that holds Python objects."""
    # NumPy leaves a file that it opened itself open when the archive is broken.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    return {key: torch.from_numpy(array) for key, array in arrays.items() if array.dtype.kind == "f"}


def recognises(state: Mapping[str, Tensor]) -> bool:
    return any(key.endswith("embedding/kernel") for key in state)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """JAX names and shapes -> timm's. Representation layers before the head ("pre_logits") do not exist in
    timm's models and are left out."""
    for prefix in PREFIXES:
        if prefix + "embedding/kernel" in state:
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    state = _unstack(state)
    dim = state["embedding/kernel"].shape[-1]
    found = {
        "patch_embed.proj.weight": state["embedding/kernel"].permute(3, 2, 0, 1).contiguous(),  # HWIO -> OIHW
        "patch_embed.proj.bias": state["embedding/bias"],
    }
    if "cls" in state:
        found["cls_token"] = state["cls"]
    for key in ("Transformer/posembed_input/pos_embedding", "pos_embedding"):
        if key in state:
            found["pos_embed"] = state[key]
    found |= _norm(state, "Transformer/encoder_norm", "norm")
    if "head/kernel" in state:
        found |= _dense(state, "head", "head")
    for i in range(_depth(state)):
        found |= _block(state, f"Transformer/encoderblock_{i}", f"blocks.{i}", dim)
    return found


def _depth(state: Mapping[str, Tensor]) -> int:
    return len({key.split("/")[1] for key in state if key.startswith("Transformer/encoderblock_")})


def _unstack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """big_vision's scanned models keep all blocks in one array: [depth, ...] -> one entry per block."""
    stacked = "Transformer/encoderblock/"
    result = {key: value for key, value in state.items() if not key.startswith(stacked)}
    for key, value in state.items():
        if key.startswith(stacked):
            rest = key.removeprefix(stacked)
            result |= {f"Transformer/encoderblock_{i}/{rest}": part for i, part in enumerate(value)}
    return result


def _block(state: Mapping[str, Tensor], source: str, target: str, dim: int) -> dict[str, Tensor]:
    # The original counts across kinds (LayerNorm_0, Attention_1, LayerNorm_2, Mlp_3), big_vision per kind.
    original = f"{source}/MultiHeadDotProductAttention_1/query/kernel" in state
    attention, mlp, norm2 = (1, 3, 2) if original else (0, 0, 1)
    attn = f"{source}/MultiHeadDotProductAttention_{attention}"
    qkv = ("query", "key", "value")
    found = {
        f"{target}.attn.qkv.weight": torch.cat([state[f"{attn}/{p}/kernel"].reshape(dim, dim).T for p in qkv]),
        f"{target}.attn.qkv.bias": torch.cat([state[f"{attn}/{p}/bias"].reshape(dim) for p in qkv]),
        f"{target}.attn.proj.weight": state[f"{attn}/out/kernel"].reshape(dim, dim).T.contiguous(),
        f"{target}.attn.proj.bias": state[f"{attn}/out/bias"],
    }
    found |= _norm(state, f"{source}/LayerNorm_0", f"{target}.norm1")
    found |= _norm(state, f"{source}/LayerNorm_{norm2}", f"{target}.norm2")
    found |= _dense(state, f"{source}/MlpBlock_{mlp}/Dense_0", f"{target}.mlp.fc1")
    return found | _dense(state, f"{source}/MlpBlock_{mlp}/Dense_1", f"{target}.mlp.fc2")


def _norm(state: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {f"{target}.weight": state[f"{source}/scale"], f"{target}.bias": state[f"{source}/bias"]}


def _dense(state: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {
        f"{target}.weight": state[f"{source}/kernel"].T.contiguous(),
        f"{target}.bias": state[f"{source}/bias"],
    }
