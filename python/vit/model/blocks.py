"""One block of the transformer: attention, then an MLP, each behind a norm and added to what it was given.

A block runs in one of two ways. As timm writes it: every module is called with one tensor, and the sums stand outside;
so hooks, adapters, wrappers and replaced modules see and do what they would in timm. Or, where nobody would notice,
with the activation and the sums inside the linear ops and no module below it called (a third of the passes over the
activations, and 30 us less per block in Python).

Letters: B batch, N tokens, C embed_dim, H heads, D = C / H head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import DropPath, LayerScale
from .mlp import MLPS, GluMlp, Mlp, SwiGLU
from .options import Options
from .parts import ACTIVATION_KINDS, NORM_KINDS, activation_of, make_norm, norm
from .planned import CallsOps
from .quant_linear import QuantLinear
from .rows import Rows
from .torch_layers import (
    as_known,
    call,
    know,
    linear,
    plain,
    planned,
    untouched,
    unwatched,
    watched_everywhere,
    watching_functions,
)


class Attention(CallsOps, nn.Module):
    """proj(attention(q, k, v)) with q, k, v from one packed projection: [B, N, C] -> [B, N, C].

    With `fused_attn` False the probabilities exist, and `attn_drop` is called with them [B, H, N, N], as in timm; plain
    PyTorch, for those who look at them.
    """

    def __init__(self, options: Options, **factory: Any) -> None:
        super().__init__()
        dim = options.embed_dim
        self.num_heads = options.num_heads
        self.head_dim = dim // self.num_heads
        self.scale = self.head_dim**-0.5  # as in timm, of probabilities that exist
        self.fused_attn = True

        def optional_norm(wanted: bool, width: int) -> nn.Module:
            return make_norm(options.norm_layer, width, options.norm_eps, **factory) if wanted else nn.Identity()

        self.qkv = nn.Linear(dim, 3 * dim, bias=options.qkv_bias, **factory)
        self.q_norm = optional_norm(options.qk_norm, self.head_dim)
        self.k_norm = optional_norm(options.qk_norm, self.head_dim)
        self.attn_drop = nn.Dropout(options.attn_drop_rate)
        self.norm = optional_norm(options.scale_attn_norm, dim)
        self.proj = nn.Linear(dim, dim, bias=options.proj_bias, **factory)
        self.proj_drop = nn.Dropout(options.proj_drop_rate)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """attn_mask, is_causal: as of scaled_dot_product_attention, and computed by it. lengths: x is [1, N, C], the
        tokens of several images, so many of each."""
        ops = self.ops
        B, N, _ = x.shape
        qkv = call(ops, self.qkv, x).reshape(B, N, 3, self.num_heads, self.head_dim)
        masked = attn_mask is not None or is_causal
        if isinstance(x, Tensor) and self.fused_attn and not masked and self._norms_are_identities():
            x = self.attend(qkv, lengths=lengths)  # [B, N, H, D]
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
            q, k = call(ops, self.q_norm, q), call(ops, self.k_norm, k)
            x = self._attend_unpacked(q, k, v, attn_mask, is_causal, lengths=lengths)
        x = call(ops, self.norm, x.flatten(2))
        return call(ops, self.proj_drop, call(ops, self.proj, x))

    def attend(self, qkv: Tensor, queries: int | None = None, lengths: Sequence[int] | None = None) -> Tensor:
        """A packed projection [B, N, 3, H, D] -> [B, queries or N, H, D]; with dropped probabilities in PyTorch."""
        rate = self.attn_drop.p if self.training else 0.0
        if rate == 0.0:
            if lengths is None:  # no names: such a call may be repeated
                return self.ops.attention(qkv, None, None, None, queries)
            return self.ops.attention(qkv, None, None, None, queries, lengths=lengths)
        if lengths is not None:
            return torch.cat([self.attend(image, queries) for image in qkv.split(list(lengths), dim=1)], dim=1)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # [B, H, N, D]
        return F.scaled_dot_product_attention(q[:, :, :queries], k, v, dropout_p=rate).transpose(1, 2)

    def _attend_unpacked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        queries: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """q, k, v [B, H, N, D] -> [B, queries or N, H, D]."""
        if lengths is not None:
            rate = self.attn_drop.p if self.training else 0.0
            if self.fused_attn and rate == 0.0:
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                return self.ops.attention(q, k, v, None, queries, lengths=lengths)
            images = zip(*(t.split(list(lengths), dim=2) for t in (q, k, v)), strict=True)
            return torch.cat([self._attend_unpacked(q, k, v, queries=queries) for q, k, v in images], dim=1)
        q = q[:, :, :queries]
        if not self.fused_attn:
            scores = q * self.scale @ k.transpose(-2, -1)
            probabilities = masked_scores(scores, attn_mask, is_causal).softmax(dim=-1)
            return (self.attn_drop(probabilities) @ v).transpose(1, 2)
        rate = self.attn_drop.p if self.training else 0.0
        if isinstance(q, Tensor) and watching_functions():
            with planned(self.ops):
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=attn_mask, dropout_p=rate, is_causal=is_causal
                ).transpose(1, 2)
        if rate == 0.0 and isinstance(q, Tensor) and attn_mask is None and not is_causal:
            return self.ops.attention(*(t.transpose(1, 2) for t in (q, k, v)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=rate, is_causal=is_causal)
        return y.transpose(1, 2)

    def probabilities(self, x: Tensor, queries: Sequence[int], rows: Rows) -> Tensor:
        """What the tokens `queries` give each token: x [B, N, C] -> softmax(scale q k^T) [B, H, Q, N]."""
        ops = self.ops
        qkv = call(ops, self.qkv, x).unflatten(2, (3, self.num_heads, self.head_dim))  # [B, N, 3, H, D]
        if self._norms_are_identities():
            return rows(qkv, None, queries, self.scale)
        q, k, _ = qkv.transpose(1, 3).unbind(2)  # [B, H, N, D]
        q, k = call(ops, self.q_norm, q), call(ops, self.k_norm, k)
        return rows(q.transpose(1, 2), k.transpose(1, 2), queries, self.scale)

    def _norms_are_identities(self) -> bool:
        return untouched(self.q_norm, nn.Identity) and untouched(self.k_norm, nn.Identity)


def masked_scores(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """scores [B, H, N, N] with what may not be seen at minus infinity; a floating-point mask is added."""
    if is_causal:
        attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, float("-inf"))
    return scores + attn_mask


class FusableBlock(CallsOps, nn.Module):
    """What a block knows of the modules below it before it passes over them; it has `attn` and `mlp`."""

    def keep_classes(self) -> None:
        """Takes the classes of the modules below as its own: a block of others calls them one by one."""
        self._as_built = tuple(map(type, self._below()))
        self._kinds: tuple[type[nn.Module], ...] = (type(self), *dict.fromkeys(self._as_built))

    def is_as_built(self, below: Sequence[nn.Module] | None = None) -> bool:
        """Whether no module below was replaced by one of another class."""
        return tuple(map(type, self._below() if below is None else below)) == self._as_built

    def _below(self) -> list[nn.Module]:
        """The modules of the block, then those of its attention and of its MLP."""
        own = self._modules
        attn, mlp = own.get("attn"), own.get("mlp")
        parts = [*own.values(), *(attn._modules.values() if attn else ()), *(mlp._modules.values() if mlp else ())]
        return [part for part in parts if part is not None]

    def _may_pass_over(self) -> bool:
        """Whether nobody would notice that the modules below are not called, and all are of the classes kept."""
        if watched_everywhere():
            return False
        below, attn = self._below(), self.attn
        return (
            self.is_as_built(below)
            and unwatched(below)
            and as_known(self._kinds)
            and bool(attn.fused_attn)  # type: ignore[union-attr]
            and plain([p for m in (self, *below) if m._parameters for p in m._parameters.values()])
        )

    def drops_elements(self) -> bool:
        """Whether single elements are dropped at random, now."""
        attn: Any
        mlp: Any
        attn, mlp = self.attn, self.mlp
        rate = attn.attn_drop.p if attn.training else 0.0
        return rate > 0.0 or any(d.training and d.p > 0.0 for d in (attn.proj_drop, mlp.drop1, mlp.drop2))


class Block(FusableBlock):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))): [B, N, C] -> [B, N, C]."""

    def __init__(
        self, dim: int, num_heads: int, options: Options | None = None, drop_path: float = 0.0, **factory: Any
    ) -> None:
        super().__init__()
        o = Options(embed_dim=dim, num_heads=num_heads) if options is None else options
        scaled = o.init_values is not None and o.init_values != 0

        def scale() -> nn.Module:
            return LayerScale(dim, o.init_values or 0.0, **factory) if scaled else nn.Identity()

        self.norm1 = make_norm(o.norm_layer, dim, o.norm_eps, **factory)
        self.attn = Attention(o, **factory)
        self.ls1 = scale()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = make_norm(o.norm_layer, dim, o.norm_eps, **factory)
        self.mlp = MLPS[o.mlp_layer](o, **factory)
        self.ls2 = scale()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.keep_classes()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """attn_mask, is_causal, lengths: see Attention."""
        masked = attn_mask is not None or is_causal
        if isinstance(x, Tensor) and not masked and self.can_fuse():
            return self.fused(x, lengths=lengths)
        ops = self.ops
        more = {} if lengths is None else {"lengths": lengths}  # timm's attention in its place knows none
        y = self.attn(call(ops, self.norm1, x), attn_mask=attn_mask, is_causal=is_causal, **more)
        x = x + drop_path(ops, self.drop_path1, call(ops, self.ls1, y), lengths)
        return x + drop_path(ops, self.drop_path2, call(ops, self.ls2, self.mlp(call(ops, self.norm2, x))), lengths)

    def probabilities(self, x: Tensor, queries: Sequence[int], rows: Rows) -> Tensor:
        """Those of its attention for the block's input x [B, N, C]: [B, H, Q, N]. rows: of `attention_rows_of`."""
        return self.attn.probabilities(call(self.ops, self.norm1, x), queries, rows)

    def can_fuse(self) -> bool:
        """Whether nobody would notice that the modules below are not called, and all are what this file makes."""
        return type(self) is Block and self._may_pass_over()

    def fused(self, x: Tensor, queries: int | None = None, lengths: Sequence[int] | None = None) -> Tensor:
        """`forward` where `can_fuse`. With `queries` only the first `queries` tokens (of each image) are computed,
        [B, queries, C]: all tokens are keys and values."""
        below: dict[str, Any] = self._modules  # nn.Module's look-up of a name takes 0.2 us
        ops, attn, mlp = self.ops, below["attn"], below["mlp"]
        of_attn, of_mlp = attn._modules, mlp._modules
        branch, x = ops.movement.fork(x)
        if queries is not None:
            x = first_of_each(ops, x, queries, lengths)
        qkv = linear(ops, of_attn["qkv"], norm(ops, below["norm1"], branch))
        qkv = qkv.view(*branch.shape[:2], 3, attn.num_heads, attn.head_dim)
        y = norm(ops, of_attn["norm"], self._attended(attn, qkv, queries, lengths).flatten(2))
        x = _add(ops, x, y, of_attn["proj"], below["ls1"], of_attn["proj_drop"], below["drop_path1"], lengths)
        branch, x = ops.movement.fork(x)
        y = mlp.inner(norm(ops, below["norm2"], branch), activation_of(of_mlp["act"]))
        return _add(ops, x, y, of_mlp["fc2"], below["ls2"], of_mlp["drop2"], below["drop_path2"], lengths)

    def _attended(self, attn: Any, qkv: Tensor, queries: int | None, lengths: Sequence[int] | None) -> Tensor:
        """A packed projection [B, N, 3, H, D] -> [B, queries or N, H, D]; q and k are normed first where they are."""
        ops, q_norm = self.ops, attn._modules["q_norm"]
        if type(q_norm) is nn.Identity:
            return attn.attend(qkv, queries, lengths)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        q, k = norm(ops, q_norm, q), norm(ops, attn.k_norm, k)
        return attn._attend_unpacked(q, k, v, queries=queries, lengths=lengths)


def drop_path(ops: Any, module: nn.Module, x: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """module(x), which drops images whole."""
    return call(ops, module, x) if lengths is None or not isinstance(module, DropPath) else module(x, lengths)


def first_of_each(ops: Any, x: Tensor, count: int, lengths: Sequence[int] | None) -> Tensor:
    """The first `count` tokens of each image: [B, N, C] -> [B, count, C], with lengths [1, N, C] -> [1, B count, C]."""
    if lengths is None:
        return ops.movement.first(x, count)
    return ops.movement.join([ops.movement.first(image, count) for image in ops.movement.split(x, lengths)])


def _add(
    ops: Any,
    x: Tensor,
    y: Tensor,
    layer: nn.Linear,
    scale: nn.Module,
    drop: nn.Dropout,
    path: nn.Module,
    lengths: Sequence[int] | None,
) -> Tensor:
    """x + drop_path(scale(drop(layer(y)))): one op unless something random stands between the branch and the sum."""
    gamma = scale.gamma if isinstance(scale, LayerScale) else None
    if (drop.training and drop.p) or (path.training and isinstance(path, DropPath) and path.drop_prob):
        branch = drop(linear(ops, layer, y))
        return x + drop_path(ops, path, branch if gamma is None else branch * gamma, lengths)
    return linear(ops, layer, y, None, x, gamma)


_KINDS: tuple[type[nn.Module], ...] = (
    Block,
    Attention,
    Mlp,
    GluMlp,
    SwiGLU,
    nn.Identity,
    DropPath,
    LayerScale,
    nn.Linear,
    QuantLinear,
    nn.Dropout,
)
_KINDS = (*_KINDS, *NORM_KINDS, *ACTIVATION_KINDS)
know(*_KINDS)
