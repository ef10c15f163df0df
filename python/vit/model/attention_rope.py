"""Attention with rotary positions, and the two ways in which timm's eva.py keeps the biases of its projections.

Letters: B batch, N tokens, C embed_dim, H heads, D head dimension, T prefix tokens (class, registers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import masked_scores
from .eva_options import EvaOptions
from .parts import make_norm
from .planned import CallsOps, HasBuffers
from .rows import Rows
from .torch_layers import call, know, plain, untouched


class AttentionRope(CallsOps, nn.Module):
    """proj(norm(attention(rotated q, rotated k, v))): [B, N, C] -> [B, N, C].

    rope [N - T, 2 D], or [H, N - T, 2 D], or with a batch in front, turns pairs of elements of q and k after the first
    T tokens: neighbours, or with rotate_half k and k + D / 2. qkv_fused: whether q, k and v are one projection or
    three. `fused_attn` False: the probabilities exist, in plain PyTorch.
    """

    def __init__(self, options: EvaOptions, **factory: Any) -> None:
        super().__init__()
        dim = options.embed_dim
        self.num_heads = options.num_heads
        self.head_dim = dim // self.num_heads
        self.scale = self.head_dim**-0.5  # as in timm, of probabilities that exist
        self.num_prefix_tokens = options.prefix_tokens
        self.rotate_half = options.rope_rotate_half
        self.fused_attn = True
        self.qkv: Any = None
        self.q_proj: Any = None
        self.k_proj: Any = None
        self.v_proj: Any = None
        self._make_projections(dim, options.qkv_bias, options.qkv_fused, factory)

        def norm(wanted: bool, width: int) -> nn.Module:
            return make_norm(options.norm_layer, width, options.norm_eps, **factory) if wanted else nn.Identity()

        self.q_norm = norm(options.qk_norm, self.head_dim)
        self.k_norm = norm(options.qk_norm, self.head_dim)
        self.attn_drop = nn.Dropout(options.attn_drop_rate)
        self.norm = norm(options.scale_attn_norm, dim)
        self.proj = nn.Linear(dim, dim, options.proj_bias, **factory)
        self.proj_drop = nn.Dropout(options.proj_drop_rate)

    def _make_projections(self, dim: int, bias: bool, fused: bool, factory: dict[str, Any]) -> None:
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim, bias, **factory)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias, **factory) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """attn_mask, is_causal: as of scaled_dot_product_attention, and computed by it. lengths: x is [1, N, C], the
        tokens of several images, so many of each, and rope has a row for every token."""
        ops = self.ops
        x = call(ops, self.norm, self.attend(x, rope, call, None, attn_mask, is_causal, lengths))
        return call(ops, self.proj_drop, call(ops, self.proj, x))

    def attend(
        self,
        x: Tensor,
        rope: Tensor | None,
        layer: Callable[..., Tensor],
        queries: int | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """x [B, N, C] -> what the heads give, side by side [B, queries or N, C]. layer: how projections are called."""
        ops = self.ops
        packed, q, k, v = self._project(x, layer, queries if lengths is None else None)
        masked = attn_mask is not None or is_causal
        if packed is not None and rope is None and self._norms_are_identities() and not masked and self._attends():
            return ops.attention(packed, queries=queries, lengths=lengths).flatten(2)
        if packed is not None:
            q, k, v = ops.movement.unpack(packed) if isinstance(packed, Tensor) else packed.unbind(2)
            if queries is not None and lengths is None:
                q = ops.movement.first(q.flatten(2), queries).unflatten(2, (self.num_heads, -1))
        if lengths is not None:
            q, k = self._placed(q, k, rope, prefix=0)
            if self._attends():
                return ops.attention(q, k, v, queries=queries, lengths=lengths).flatten(2)
            images = zip(*(t.split(list(lengths), dim=1) for t in (q, k, v)), strict=True)
            each = [self._attend(q, k, v, None, False)[:, :queries] for q, k, v in images]
            return torch.cat(each, dim=1).flatten(2)
        q, k = self._placed(q, k, rope, queries)
        return self._attend(q, k, v, attn_mask, is_causal).flatten(2)

    def _placed(
        self, q: Tensor, k: Tensor, rope: Tensor | None, queries: int | None = None, prefix: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """q [B, queries or N, H, D] and k [B, N, H, D] normed and rotated, where they are."""
        ops, half = self.ops, "half" if self.rotate_half else "interleaved"
        if not self._norms_are_identities():  # timm's norms see the heads before the tokens
            q, k = (call(ops, n, t.transpose(1, 2)).transpose(1, 2) for n, t in ((self.q_norm, q), (self.k_norm, k)))
        if rope is not None:
            prefix = self.num_prefix_tokens if prefix is None else prefix
            k = ops.rotary(k, rope, prefix, half)
            if queries is None or queries > prefix:
                q = ops.rotary(q, rope if queries is None else rope[..., : queries - prefix, :], prefix, half)
        return q, k

    def _norms_are_identities(self) -> bool:
        return untouched(self.q_norm, nn.Identity) and untouched(self.k_norm, nn.Identity)

    def probabilities(self, x: Tensor, queries: Sequence[int], rows: Rows, rope: Tensor | None = None) -> Tensor:
        """What the tokens `queries` give each token: x [B, N, C] -> softmax(scale q k^T) [B, H, Q, N]."""
        packed, q, k, _ = self._project(x, call, None)
        if packed is not None and rope is None and self._norms_are_identities():
            return rows(packed, None, queries, self.scale)
        if packed is not None:
            q, k, _ = packed.unbind(2)
        q, k = self._placed(q, k, rope)
        return rows(q, k, queries, self.scale)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """q, k, v [B, N, H, D] -> [B, N, H, D]."""
        if self._attends() and attn_mask is None and not is_causal:
            return self.ops.attention(q, k, v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.fused_attn:
            rate = self.attn_drop.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=rate, is_causal=is_causal)
            return y.transpose(1, 2)
        scores = q * self.scale @ k.transpose(-2, -1)
        probabilities = masked_scores(scores, attn_mask, is_causal).softmax(dim=-1)
        return (self.attn_drop(probabilities) @ v).transpose(1, 2)

    def _attends(self) -> bool:
        """Whether the op is wanted: probabilities are neither looked at nor dropped."""
        return self.fused_attn and not (self.training and self.attn_drop.p)

    def _project(self, x: Tensor, layer: Callable[..., Tensor], queries: int | None) -> tuple[Any, Any, Any, Any]:
        """One packed projection [B, N, 3, H, D], or q, k and v [B, N, H, D] (q of the first `queries` tokens)."""
        ops, heads = self.ops, (self.num_heads, self.head_dim)
        if self.qkv is not None:
            return self._packed(x, layer).reshape(*x.shape[:2], 3, *heads), None, None, None
        for_q, x = ops.movement.fork(x)
        for_k, for_v = ops.movement.fork(x)
        if queries is not None:
            for_q = ops.movement.first(for_q, queries)
        q, k, v = layer(ops, self.q_proj, for_q), layer(ops, self.k_proj, for_k), layer(ops, self.v_proj, for_v)
        return None, q.unflatten(2, heads), k.unflatten(2, heads), v.unflatten(2, heads)

    def _packed(self, x: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        """[B, N, C] -> [B, N, 3 C]."""
        return layer(self.ops, self.qkv, x)


class EvaAttention(HasBuffers, AttentionRope):
    """The same with EVA's biases: none for keys. Of one fused projection they are parameters of their own, `q_bias` and
    `v_bias`, and the module `qkv` is not called where it has them, as in timm. What was put in its place is (a layer
    with an adapter): by its weight alone the adapter would have no effect until it is merged."""

    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None

    def _make_projections(self, dim: int, bias: bool, fused: bool, factory: dict[str, Any]) -> None:
        self.register_parameter("q_bias", nn.Parameter(torch.empty(dim, **factory)) if fused and bias else None)
        self.register_buffer("k_bias", torch.empty(dim, **factory) if fused and bias else None, persistent=False)
        self.register_parameter("v_bias", nn.Parameter(torch.empty(dim, **factory)) if fused and bias else None)
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim, bias=False, **factory)
        else:
            self.q_proj = nn.Linear(dim, dim, bias, **factory)
            self.k_proj = nn.Linear(dim, dim, bias=False, **factory)
            self.v_proj = nn.Linear(dim, dim, bias, **factory)

    def init_non_persistent_buffers(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """The zeros of the keys."""
        if self.k_bias is not None and self.q_bias is not None:
            self.k_bias = torch.zeros_like(self.k_bias, device=device or self.q_bias.device, dtype=self.q_bias.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EvaAttention:
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers()  # memory that to_empty() has taken holds nothing
        return self

    def join_biases(self) -> None:
        """Makes the biases apart one bias of the projection, which is called like any other from then on."""
        q, k, v = self.q_bias, self.k_bias, self.v_bias
        if q is not None and k is not None and v is not None and type(self.qkv) is nn.Linear:
            self.qkv.bias = nn.Parameter(torch.cat([q, k, v]), requires_grad=q.requires_grad)
            self.q_bias = self.k_bias = self.v_bias = None

    def _packed(self, x: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        q, k, v = self.q_bias, self.k_bias, self.v_bias  # each looked at once: a parametrization computes at each look
        if q is None or k is None or v is None:
            return layer(self.ops, self.qkv, x)
        bias = torch.cat([q, k, v])
        if type(self.qkv) is not nn.Linear:
            return call(self.ops, self.qkv, x) + bias
        weight = self.qkv.weight
        if isinstance(x, Tensor) and plain((x, weight, bias)):
            return self.ops.linear(x, weight, bias)
        return F.linear(x, weight, bias)


know(AttentionRope, EvaAttention)
