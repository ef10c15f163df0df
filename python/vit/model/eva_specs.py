"""The calls of ops that an Eva makes: the mirror of its forward, from which backends are chosen."""

from __future__ import annotations

from typing import Any

import torch

from ..backends import Spec
from .eva_options import EvaOptions
from .specs import ForwardSpecs

Rows = tuple[int | str, ...]


def specs_of(model: Any, device: torch.device, dtype: torch.dtype, training: bool) -> list[Spec]:
    """Every kind of call that the forward makes, fused or not. B is "*": any number of images."""
    return EvaSpecs(model, device, dtype, training).everything()


class EvaSpecs(ForwardSpecs):
    """The calls of an Eva."""

    o: EvaOptions

    def everything(self) -> list[Spec]:
        o, model, C = self.o, self.model, self.o.embed_dim
        patches = model.patch_embed.num_patches
        self.linear(("*", patches), model.patch_embed.patch_values, C)
        if o.pre_norm:
            self.norm(o.norm_layer, ("*", self.tokens), C)
        self.block(self.tokens)
        if model.global_pool == "token" and not o.use_post_norm:
            self.block(1)
        if o.mlp_layer == "mlp":
            # Where a hook or a replaced module is between them, the activation is an op of its own.
            self.linear(("*", self.tokens), C, o.mlp_hidden)
            self.activation(("*", self.tokens), o.mlp_hidden)
        self.head()
        return self.specs

    def block(self, tokens: int, options: dict[str, Any] | None = None) -> None:
        """A block that computes the first `tokens` tokens."""
        o, C = self.o, self.o.embed_dim
        self.attention(tokens)
        self.norm(o.norm_layer, ("*", self.tokens), C)
        if o.scale_attn_norm:
            self.norm(o.norm_layer, ("*", tokens), C)
        self.linear(("*", tokens), C, C)
        self.norm(o.norm_layer, ("*", tokens), C)
        self.mlp(("*", tokens))

    def attention(self, tokens: int) -> None:
        o, C, H = self.o, self.o.embed_dim, self.o.num_heads
        heads, queries = ("*", self.tokens, H, C // H), ("*", tokens, H, C // H)
        one = tokens != self.tokens
        self.linear(("*", self.tokens), C, 3 * C if o.qkv_fused else C)
        if not o.qkv_fused:
            self.linear(("*", tokens), C, C)
        if o.qk_norm:
            self.norm(o.norm_layer, ("*", H, tokens), C // H)
            self.norm(o.norm_layer, ("*", H, self.tokens), C // H)
        if o.use_rot_pos_emb:
            pairing = "half" if o.rope_rotate_half else "interleaved"
            self.add("rotary", {"pairing": pairing}, x=heads)
        packed = o.qkv_fused and not o.use_rot_pos_emb and not o.qk_norm
        options: dict[str, Any] = {"queries": tokens} if one and packed else {}
        if self.training and o.attn_drop_rate:
            options["dropout"] = o.attn_drop_rate
        self.add("attention", options, q=heads if packed else queries, k=heads, v=heads)

    def head(self) -> None:
        o, model, C = self.o, self.model, self.o.embed_dim
        pooled: Rows = ("*", self.tokens) if model.global_pool == "" else ("*",)
        if o.norm_after_blocks:
            self.norm(o.norm_layer, ("*", self.tokens), C)
            if model.global_pool == "token" and not o.use_post_norm:
                self.norm(o.norm_layer, ("*", 1), C)
        if model.global_pool == "map":
            self.attention_pool(o.attn_pool, self.tokens)
        if o.norm_after_pool:
            self.norm(o.norm_layer, pooled, C)
        self.classifier(pooled)
