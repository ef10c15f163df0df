"""What a Vision Transformer asks of the ops: the mirror of its forward, from which backends are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..backends import Spec
from .layers import PatchEmbed
from .torch_layers import ACTIVATIONS

#: What torch.nn.GELU calls the activations of `act_layer`.
APPROXIMATE = {name: approximate for approximate, name in ACTIVATIONS.items()}


class Sizes(Protocol):
    """What of a VisionTransformer decides about the calls of its forward."""

    embed_dim: int
    num_heads: int
    mlp_hidden: int
    num_classes: int
    num_prefix_tokens: int
    act_layer: str
    attn_drop_rate: float
    global_pool: str
    norm_after_pool: bool
    patch_embed: PatchEmbed


def specs_of(model: Sizes, device: torch.device, dtype: torch.dtype, training: bool) -> list[Spec]:
    """Every kind of call that the forward makes, fused or not. B is "*": any number of images."""
    C, H, hidden = model.embed_dim, model.num_heads, model.mlp_hidden
    patches = model.patch_embed.num_patches
    N = model.num_prefix_tokens + patches
    asked: list[Spec] = []

    def ask(op: str, options: Mapping[str, Any] | None = None, **shapes: tuple[int | str, ...]) -> None:
        asked.append(Spec(op, dtype, shapes, training, options or {}, device.type))

    def linear(rows: tuple[int | str, ...], inputs: int, outputs: int, **options: Any) -> None:
        ask("linear", options, x=(*rows, inputs), weight=(outputs, inputs))

    def block(tokens: int, options: dict[str, Any]) -> None:
        """A block of which the first so many tokens are computed."""
        rows, heads = ("*", tokens), ("*", N, H, C // H)
        ask("attention", options, q=heads, k=heads, v=heads)
        linear(rows, C, C)
        ask("layer_norm", x=(*rows, C), weight=(C,))
        linear(rows, C, hidden, activation=model.act_layer)
        linear(rows, hidden, C)

    linear(("*", patches), model.patch_embed.patch_values, C)
    ask("layer_norm", x=("*", N, C), weight=(C,))
    linear(("*", N), C, 3 * C)
    dropout = {"dropout": model.attn_drop_rate} if training and model.attn_drop_rate else {}
    block(N, dropout)
    if model.global_pool == "token":
        block(1, dropout | {"queries": 1})
    # Where a hook or a replaced module is between them, the activation is an op of its own.
    linear(("*", N), C, hidden)
    ask("gelu", {"approximate": APPROXIMATE[model.act_layer]}, x=("*", N, hidden))
    pooled = ("*", N) if model.global_pool == "" else ("*",)
    if model.norm_after_pool:
        ask("layer_norm", x=(*pooled, C), weight=(C,))
    if model.num_classes:
        linear(pooled, C, model.num_classes)
    return asked
