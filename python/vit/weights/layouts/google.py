"""The .npz layout of the original JAX code and of big_vision: convolution and dense kernels stored input-first.

Sources: github.com/google-research/vision_transformer (vit_jax/models_vit.py) and google-research/big_vision
(big_vision/models/vit.py, models/proj/image_text/naflex_vit.py), whose parameter names are converted here. Both
normalise the tokens before they take the class token or the mean: an archive without `cls` is a model with
global_pool="avg", fc_norm=False, unless it has the attention pool.

The original counts layers across kinds (LayerNorm_0, Attention_1, LayerNorm_2, Mlp_3), big_vision per kind.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout import Converted, Layout, split_query, to
from .transformers_siglip2 import ANY_SIZE, as_image

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
SCANNED = "Transformer/encoderblock/"
NO_LAYER = "a layer before the head that this model does not have"


def as_convolution(kernel: Tensor) -> Tensor:
    """HWIO -> OIHW; NaFlex's matrix has rows of (row, column, channel)."""
    if kernel.ndim == 2:
        return as_image(kernel.T)
    if kernel.ndim != 4:
        raise RuntimeError(f"embedding/kernel is {list(kernel.shape)}")
    return kernel.permute(3, 2, 0, 1).contiguous()


def dense(kernel: Tensor) -> Tensor:
    if kernel.ndim != 2:
        raise RuntimeError(f"a kernel is {list(kernel.shape)}, not [inputs, outputs]")
    return kernel.T.contiguous()


def heads_stacked(*parts: Tensor) -> Tensor:
    """Kernels [C, H, D] -> rows of one matrix; biases [H, D] -> one vector."""
    if parts[0].ndim == 2:
        return torch.cat([part.reshape(-1) for part in parts])
    return torch.cat([part.reshape(len(part), -1).T for part in parts])


def heads_joined(kernel: Tensor) -> Tensor:
    """[H, D, C] -> [C, H * D]."""
    return kernel.reshape(-1, kernel.shape[-1]).T.contiguous()


def query_apart(*parts: Tensor) -> tuple[Tensor, Tensor]:
    return split_query(heads_stacked(*parts))


def _attention(source: str, target: str, split: bool = False) -> Iterator[Any]:
    for kind, name in (("kernel", "weight"), ("bias", "bias")):
        parts = [f"{source}/{part}/{kind}" for part in ("query", "key", "value")]
        if split:
            yield to(parts, (f"{target}.q.{name}", f"{target}.kv.{name}"), query_apart)
        else:
            yield to(parts, f"{target}.qkv.{name}", heads_stacked)
    yield to(f"{source}/out/kernel", f"{target}.proj.weight", heads_joined)
    yield to(f"{source}/out/bias", f"{target}.proj.bias")


def _norm(source: str, target: str) -> Iterator[Any]:
    yield to(f"{source}/scale", f"{target}.weight")
    yield to(f"{source}/bias", f"{target}.bias")


def _dense(source: str, target: str) -> Iterator[Any]:
    yield to(f"{source}/kernel", f"{target}.weight", dense)
    yield to(f"{source}/bias", f"{target}.bias")


def _rules() -> Iterator[Any]:
    yield to(MARK, "patch_embed.proj.weight", as_convolution)
    yield to("embedding/bias", "patch_embed.proj.bias")
    yield to("cls", "cls_token")
    yield to("Transformer/posembed_input/pos_embedding", "pos_embed")
    yield to("pos_embedding", "pos_embed_of_patches")
    block = "Transformer/encoderblock_{n}"
    for attention, mlp, norm2 in ((1, 3, 2), (0, 0, 1)):
        yield from _attention(f"{block}/MultiHeadDotProductAttention_{attention}", "blocks.{n}.attn")
        yield from _norm(f"{block}/LayerNorm_{norm2}", "blocks.{n}.norm2")
        for i in range(2):
            yield from _dense(f"{block}/MlpBlock_{mlp}/Dense_{i}", f"blocks.{{n}}.mlp.fc{i + 1}")
    yield from _norm(f"{block}/LayerNorm_0", "blocks.{n}.norm1")
    yield from _norm("Transformer/encoder_norm", "norm")
    yield from _dense("head", "head")
    yield to("MAPHead_0/probe", "attn_pool.latent")
    yield from _attention("MAPHead_0/MultiHeadDotProductAttention_0", "attn_pool", split=True)
    yield from _norm("MAPHead_0/LayerNorm_0", "attn_pool.norm")
    for i in range(2):
        yield from _dense(f"MAPHead_0/MlpBlock_0/Dense_{i}", f"attn_pool.mlp.fc{i + 1}")


@dataclass(frozen=True)
class Google(Layout):
    """Names with slashes, below a prefix of their own kind."""

    def prefixes(self, names: Collection[Any]) -> Iterator[str]:
        found = next((prefix for prefix in PREFIXES if prefix + MARK in names), None)
        if found is not None:
            yield found

    def stands_outside(self, name: str) -> str | None:
        return next(
            (why for start, why in BESIDE if name == start or (start[-1] == "/" and name.startswith(start))), None
        )

    def convert(self, state: Mapping[str, Tensor]) -> Converted:
        left = _unstacked(state)
        dropped = _without_representation(left)
        result = super().convert(left)
        result.dropped |= dropped
        _positions(result, original=any("MultiHeadDotProductAttention_1/" in name for name in left))
        if "attn_pool.latent" in result.state:
            result.implied["global_pool"] = "map"
        return result


def _unstacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """big_vision's scanned models keep all blocks in one array: [depth, ...] -> one entry per block."""
    result = {key: value for key, value in state.items() if not key.startswith(SCANNED)}
    arrays = {key.removeprefix(SCANNED): value for key, value in state.items() if key.startswith(SCANNED)}
    depths = {len(value) if value.ndim else 0 for value in arrays.values()}
    if len(depths) > 1:
        raise RuntimeError(f"encoderblock/* have {', '.join(map(str, sorted(depths)))} blocks")
    for rest, value in arrays.items():
        result |= {f"Transformer/encoderblock_{i}/{rest}": part for i, part in enumerate(value)}
    return result


def _without_representation(state: dict[str, Tensor]) -> dict[str, str]:
    """Takes pre_logits, a layer that timm's models lack, out together with the head behind it."""
    keys = [key for key in state if key.startswith("pre_logits/")]
    if not keys:
        return {}
    head = [key for key in ("head/kernel", "head/bias") if key in state]
    used = any(bool(state[key].any()) for key in head)
    for key in keys + head:
        del state[key]
    return dict.fromkeys(keys, NO_LAYER) | dict.fromkeys(
        head, "the head behind pre_logits" if used else "a head of zeros"
    )


def _positions(result: Converted, original: bool) -> None:
    """Positions with a row for the class token. big_vision puts that token before the patches after these have their
    positions, so that its table has rows for patches alone: the class token's is then zero.

    A NaFlex model has positions [n, n, C]; a model without any has fixed ones (big_vision) or none.
    """
    state, of_patches = result.state, "pos_embed_of_patches" in result.state
    result.rename("pos_embed_of_patches", "pos_embed")
    if (table := state.get("pos_embed", result.state.get("pos_embed"))) is None:
        result.implied["pos_embed"] = "none" if original else "sincos2d"
        return
    if of_patches and table.ndim == 3 and len(table) == table.shape[1] > 1:
        result.state["pos_embed"] = table.reshape(1, -1, table.shape[-1])
        result.implied |= ANY_SIZE
        return
    rows = table.shape[-2] if table.ndim > 1 else 0
    whole = math.isqrt(rows) ** 2 == rows, math.isqrt(max(rows - 1, 0)) ** 2 == rows - 1
    missing = "cls_token" in result.state and ((whole[0] and not whole[1]) or (of_patches and whole[0] == whole[1]))
    if missing:
        result.state["pos_embed"] = torch.cat([table.new_zeros(table.shape[0], 1, table.shape[2]), table], dim=1)


LAYOUT = Google(name="Google's JAX", marks=(MARK,), rules=tuple(_rules()), base="vit_base_patch16_224")
