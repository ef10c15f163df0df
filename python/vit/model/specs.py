"""The calls of ops that a Vision Transformer makes: the mirror of its forward, from which backends are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..backends import Spec
from .layers import PatchEmbed
from .options import Options
from .torch_layers import ACTIVATIONS

#: What torch.nn.GELU calls the activations of `act_layer`.
APPROXIMATE = {name: approximate for approximate, name in ACTIVATIONS.items()}


class Sizes(Protocol):
    """What of a VisionTransformer decides about the calls of its forward."""

    options: Options
    num_classes: int
    num_prefix_tokens: int
    global_pool: str
    pool_include_prefix: bool
    patch_embed: PatchEmbed
    reads_one_token: bool


def specs_of(model: Sizes, device: torch.device, dtype: torch.dtype, training: bool) -> list[Spec]:
    """Every kind of call that the forward makes, fused or not. B is "*": any number of images."""
    return ForwardSpecs(model, device, dtype, training).everything()


class ForwardSpecs:
    """The calls of a VisionTransformer."""

    def __init__(self, model: Sizes, device: torch.device, dtype: torch.dtype, training: bool) -> None:
        self.model, self.o = model, model.options
        self.device, self.dtype, self.training = device, dtype, training
        self.tokens = model.num_prefix_tokens + model.patch_embed.num_patches
        self.specs: list[Spec] = []

    def add(self, op: str, options: Mapping[str, Any] | None = None, **shapes: tuple[int | str, ...]) -> None:
        kind, index = self.device.type, self.device.index
        self.specs.append(Spec(op, self.dtype, shapes, self.training, options or {}, kind, device_index=index))

    def linear(self, rows: tuple[int | str, ...], inputs: int, outputs: int, **options: Any) -> None:
        self.add("linear", options, x=(*rows, inputs), weight=(outputs, inputs))

    def norm(self, kind: str, rows: tuple[int | str, ...], width: int) -> None:
        self.add("layer_norm" if kind == "layernorm" else "rms_norm", x=(*rows, width), weight=(width,))

    def activation(self, rows: tuple[int | str, ...], width: int) -> None:
        if self.o.act_layer in APPROXIMATE:
            self.add("gelu", {"approximate": APPROXIMATE[self.o.act_layer]}, x=(*rows, width))

    def everything(self) -> list[Spec]:
        o, model, N, C = self.o, self.model, self.tokens, self.o.embed_dim
        patches = model.patch_embed.num_patches
        self.linear(("*", patches), model.patch_embed.patch_values, C)
        if o.embed_norm_layer is not None:
            grid = model.patch_embed.grid_size if o.dynamic_img_size else (patches,)
            self.norm(o.embed_norm_layer, ("*", *grid), C)
        self.norm(o.norm_layer, ("*", N), C)
        self.linear(("*", N), C, 3 * C)
        if o.qk_norm:
            self.norm(o.norm_layer, ("*", o.num_heads, N), C // o.num_heads)
        dropout = {"dropout": o.attn_drop_rate} if self.training and o.attn_drop_rate else {}
        self.block(N, dropout)
        if model.global_pool == "token" and model.reads_one_token:
            self.block(1, dropout if o.qk_norm else dropout | {"queries": 1})
        if o.mlp_layer == "mlp":
            # Where a hook or a replaced module is between them, the activation is an op of its own.
            self.linear(("*", N), C, o.mlp_hidden)
            self.activation(("*", N), o.mlp_hidden)
        self.head()
        return self.specs

    def block(self, tokens: int, options: dict[str, Any]) -> None:
        """A block that computes the first `tokens` tokens."""
        o, C, H = self.o, self.o.embed_dim, self.o.num_heads
        rows, queries = ("*", tokens), ("*", tokens if o.qk_norm else self.tokens, H, C // H)
        heads = ("*", self.tokens, H, C // H)
        self.add("attention", options, q=queries, k=heads, v=heads)
        if o.scale_attn_norm:
            self.norm(o.norm_layer, rows, C)
        self.linear(rows, C, C)
        self.norm(o.norm_layer, rows, C)
        self.mlp(rows)

    def mlp(self, rows: tuple[int | str, ...], inner_norm: bool = True) -> None:
        o, C, hidden = self.o, self.o.embed_dim, self.o.mlp_hidden
        if o.mlp_layer == "mlp":
            self.linear(rows, C, hidden, activation=o.act_layer)
        else:
            self.linear(rows, C, hidden)
        if o.mlp_layer == "swiglu_packed":
            hidden //= 2
        if o.mlp_layer != "mlp" and o.act_layer == "silu":
            packed = o.mlp_layer == "swiglu_packed"
            self.add("swiglu", x=(*rows, 2 * hidden if packed else hidden))
        elif o.mlp_layer != "mlp":
            self.activation(rows, hidden)
        if o.scale_mlp_norm and inner_norm:
            self.norm(o.norm_layer, rows, hidden)
        self.linear(rows, hidden, C)

    def head(self) -> None:
        o, model, C = self.o, self.model, self.o.embed_dim
        if model.global_pool == "map":
            self.attention_pool(o, self.tokens - (0 if model.pool_include_prefix else model.num_prefix_tokens))
        pooled: tuple[int | str, ...] = ("*", self.tokens) if model.global_pool == "" else ("*",)
        if o.norm_after_pool and o.final_norm:
            self.norm(o.norm_layer, pooled, C)
        self.classifier(pooled)

    def classifier(self, pooled: tuple[int | str, ...]) -> None:
        """The head, on what is pooled; of a decoder each stage, on four times as many cells as the one before."""
        o, cells, width = self.o, self.model.patch_embed.num_patches, self.o.embed_dim
        if o.representation_size:
            self.linear(pooled, width, o.representation_size)
            width = o.representation_size
        if not self.model.num_classes:
            return
        for wider in o.decoder:
            self.linear(("*", cells), 9 * width, 4 * wider)
            cells, width = 4 * cells, wider
            self.norm(o.norm_layer, ("*", cells), width)
            self.activation(("*", cells), width)
        self.linear(("*", cells) if o.decoder else pooled, width, self.model.num_classes)

    def attention_pool(self, o: Options, count: int) -> None:
        """The pooling by attention over `count` tokens."""
        C, H, D = o.embed_dim, o.num_heads, o.embed_dim // o.num_heads
        self.linear(("*", 1), C, C)
        self.linear(("*", count), C, 2 * C)
        self.add("attention", q=("*", 1, H, D), k=("*", count, H, D), v=("*", count, H, D))
        self.norm(o.norm_layer, ("*", 1), C)
        self.linear(("*", 1), C, o.mlp_hidden, activation=o.act_layer)
        self.activation(("*", 1), o.mlp_hidden)
        self.linear(("*", 1), C, o.mlp_hidden)
        self.linear(("*", 1), o.mlp_hidden, C)
