"""The blocks of EVA-02, DINOv3 and their kin (timm's eva.py): queries and keys are rotated by position, the MLP may be
gated, branches may be scaled and normed inside.

As in blocks.py a block runs in one of two ways: as timm writes it, every module called with timm's tensors; or, where nobody
would notice, with scales and sums inside the linear ops and no module below it called.

Letters: B batch, N tokens, C embed_dim, H heads, D head dimension, T prefix tokens (class, registers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Mlp
from .layers import DropPath
from .planned import CallsOps
from .torch_layers import (
    ACTIVATIONS,
    as_known,
    call,
    dropout,
    hooked_everywhere,
    know,
    layer_norm,
    linear,
    plain,
    untouched,
    unwatched,
)

#: width -> a norm.
MakeNorm = Callable[[int], nn.Module]


class AttentionRope(CallsOps, nn.Module):
    """proj(norm(attention(rotated q, rotated k, v))): [B, N, C] -> [B, N, C].

    rope [N - T, 2 D], or [H, N - T, 2 D], or with a batch in front, turns pairs of elements of q and k after the first T
    tokens: neighbours, or with rotate_half k and k + D / 2. qkv_fused: whether q, k and v are one projection or three.
    `fused_attn` False: the probabilities exist, in plain PyTorch.
    """

    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        qkv_fused: bool,
        num_prefix_tokens: int,
        attn_drop: float,
        proj_drop: float,
        norm: MakeNorm,
        qk_norm: bool,
        scale_norm: bool,
        rotate_half: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5  # as in timm, of probabilities that exist
        self.num_prefix_tokens = num_prefix_tokens
        self.rotate_half = rotate_half
        self.fused_attn = True
        self.qkv: nn.Module | None = None
        self.q_proj: nn.Module | None = None
        self.k_proj: nn.Module | None = None
        self.v_proj: nn.Module | None = None
        self._make_projections(dim, qkv_bias, qkv_fused, factory)
        self.q_norm = norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm(dim) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def _make_projections(self, dim: int, bias: bool, fused: bool, factory: dict[str, Any]) -> None:
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim, bias, **factory)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias, **factory) for _ in range(3))

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        ops = self.ops
        x = call(ops, self.norm, self.attend(x, rope, call))
        return call(ops, self.proj_drop, call(ops, self.proj, x))

    def attend(
        self, x: Tensor, rope: Tensor | None, layer: Callable[..., Tensor], queries: int | None = None
    ) -> Tensor:
        """x [B, N, C] -> what the heads give, side by side [B, queries or N, C]. layer: how projections are called."""
        ops, half = self.ops, "half" if self.rotate_half else "interleaved"
        packed, q, k, v = self._project(x, layer, queries)
        normed = not (untouched(self.q_norm, nn.Identity) and untouched(self.k_norm, nn.Identity))
        if packed is not None and rope is None and not normed and self._attends():
            return ops.attention(packed, queries=queries).flatten(2)
        if packed is not None:
            q, k, v = ops.movement.unpack(packed) if isinstance(packed, Tensor) else packed.unbind(2)
            if queries is not None:
                q = ops.movement.first(q.flatten(2), queries).unflatten(2, (self.num_heads, -1))
        if normed:  # timm's norms see the heads before the tokens
            q, k = (call(ops, n, t.transpose(1, 2)).transpose(1, 2) for n, t in ((self.q_norm, q), (self.k_norm, k)))
        if rope is not None:
            prefix = self.num_prefix_tokens
            k = ops.rotary(k, rope, prefix, half)
            if queries is None or queries > prefix:
                q = ops.rotary(q, rope if queries is None else rope[..., : queries - prefix, :], prefix, half)
        return self._attend(q, k, v).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, N, H, D] -> [B, N, H, D]."""
        if self._attends():
            return self.ops.attention(q, k, v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.fused_attn:
            rate = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, dropout_p=rate).transpose(1, 2)
        probabilities = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return (self.attn_drop(probabilities) @ v).transpose(1, 2)

    def _attends(self) -> bool:
        """Whether the op is wanted: probabilities are neither looked at nor dropped."""
        return self.fused_attn and not (self.training and self.attn_drop.p)

    def _project(self, x: Tensor, layer: Callable[..., Tensor], queries: int | None) -> tuple[Any, Any, Any, Any]:
        """One packed projection [B, N, 3, H, D], or q, k and v [B, N, H, D] (q of the first `queries` tokens)."""
        ops, heads = self.ops, (self.num_heads, self.head_dim)
        if self.qkv is not None:
            return self._packed(x, layer).reshape(*x.shape[:2], 3, *heads), None, None, None
        assert self.q_proj is not None and self.k_proj is not None and self.v_proj is not None
        for_q, x = ops.movement.fork(x)
        for_k, for_v = ops.movement.fork(x)
        if queries is not None:
            for_q = ops.movement.first(for_q, queries)
        q, k, v = layer(ops, self.q_proj, for_q), layer(ops, self.k_proj, for_k), layer(ops, self.v_proj, for_v)
        return None, q.unflatten(2, heads), k.unflatten(2, heads), v.unflatten(2, heads)

    def _packed(self, x: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        """[B, N, C] -> [B, N, 3 C]."""
        assert self.qkv is not None
        return layer(self.ops, self.qkv, x)


class EvaAttention(AttentionRope):
    """The same with EVA's biases: none for keys. Of one fused projection they are parameters of their own, `q_bias` and
    `v_bias`, and the module `qkv` is not called where it has them, as in timm."""

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

    def init_non_persistent_buffers(self, device: torch.device | None = None) -> None:
        """The zeros of the keys."""
        if self.k_bias is not None and self.q_bias is not None:
            self.k_bias = torch.zeros_like(self.k_bias, device=device or self.q_bias.device, dtype=self.q_bias.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EvaAttention:
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers()  # memory that to_empty() has taken holds nothing
        return self

    def _packed(self, x: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        assert self.qkv is not None
        if self.q_bias is None or self.k_bias is None or self.v_bias is None:
            return layer(self.ops, self.qkv, x)
        weight, bias = self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias])
        if isinstance(x, Tensor) and plain((x, weight, bias)):
            return self.ops.linear(x, weight, bias)
        return F.linear(x, weight, bias)


class GluMlp(CallsOps, nn.Module):
    """fc2(norm(silu(g) * x)), [g; x] = fc1: [B, N, C] -> [B, N, C] with a packed fc1 [2 hidden, C], gates first."""

    def __init__(self, dim: int, hidden: int, drop: float, norm: MakeNorm | None, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden, **factory)
        self.act = nn.SiLU()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm(hidden) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return _close(self, self.gated(x, call))

    def gated(self, x: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        """[B, N, C] -> [B, N, hidden]."""
        packed = layer(self.ops, self.fc1, x)
        if isinstance(packed, Tensor) and untouched(self.act, nn.SiLU):
            return self.ops.swiglu(packed)
        gate, x = packed.chunk(2, dim=-1)
        return call(self.ops, self.act, gate) * x


class SwiGLU(CallsOps, nn.Module):
    """fc2(norm(silu(fc1_g(x)) * fc1_x(x))): [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, hidden: int, drop: float, norm: MakeNorm | None, **factory: Any) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(dim, hidden, **factory)
        self.fc1_x = nn.Linear(dim, hidden, **factory)
        self.act = nn.SiLU()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm(hidden) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return _close(self, self.gated(x, call))

    def gated(self, x: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        """[B, N, C] -> [B, N, hidden]."""
        ops = self.ops
        for_gate, x = ops.movement.fork(x)
        gate, x = layer(ops, self.fc1_g, for_gate), layer(ops, self.fc1_x, x)
        if isinstance(x, Tensor) and untouched(self.act, nn.SiLU):
            return ops.swiglu(x, gate)
        return call(ops, self.act, gate) * x


def _close(mlp: Any, x: Tensor) -> Tensor:
    """What follows the gate, every module called: [B, N, hidden] -> [B, N, C]."""
    ops = mlp.ops
    x = call(ops, mlp.norm, call(ops, mlp.drop1, x))
    return call(ops, mlp.drop2, call(ops, mlp.fc2, x))


def make_mlp(
    dim: int,
    mlp_ratio: float,
    swiglu: bool,
    align_to: int,
    drop: float,
    norm: MakeNorm | None,
    post_norm: bool = False,
    **factory: Any,
) -> Mlp | GluMlp | SwiGLU:
    """timm's choice: split where the gated values are normed or their number is rounded up, else packed."""
    hidden = int(dim * mlp_ratio)
    if swiglu and (norm or (align_to and not post_norm)):
        return SwiGLU(dim, hidden + (-hidden % align_to if align_to else 0), drop, norm, **factory)
    if swiglu:
        return GluMlp(dim, hidden, drop, norm, **factory)
    mlp = Mlp(dim, hidden, "gelu", drop, **factory)
    if norm:
        mlp.norm = norm(hidden)
    return mlp


class EvaBlock(CallsOps, nn.Module):
    """x + gamma_1 attn(norm1(x)), then x + gamma_2 mlp(norm2(x)): [B, N, C] -> [B, N, C]; gamma_1 and gamma_2 [C] are
    those of LayerScale, and None without init_values."""

    def __init__(
        self, dim: int, attn: nn.Module, mlp: nn.Module, norm: MakeNorm, drop_path: float, scaled: bool, **factory: Any
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = attn
        self.register_parameter("gamma_1", nn.Parameter(torch.empty(dim, **factory)) if scaled else None)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm(dim)
        self.mlp = mlp
        self.register_parameter("gamma_2", nn.Parameter(torch.empty(dim, **factory)) if scaled else None)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self._as_built = tuple(map(type, self._below()))
        self._kinds = tuple(dict.fromkeys((EvaBlock, *self._as_built)))

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        if isinstance(x, Tensor) and self.can_fuse():
            return self.fused(x, rope)
        ops = self.ops
        branch = self.attn(call(ops, self.norm1, x), rope=rope)
        x = x + call(ops, self.drop_path1, branch if self.gamma_1 is None else self.gamma_1 * branch)
        branch = self.mlp(call(ops, self.norm2, x))
        return x + call(ops, self.drop_path2, branch if self.gamma_2 is None else self.gamma_2 * branch)

    def _below(self) -> list[nn.Module]:
        """The modules of the block in order."""
        attn, mlp = self.attn, self.mlp
        modules = (*self._modules.values(), *attn._modules.values(), *mlp._modules.values())
        return [m for m in modules if m is not None]

    def can_fuse(self) -> bool:
        """Whether nobody would notice that the modules below are not called, and all are of the classes that were put
        here."""
        if type(self) is not EvaBlock or hooked_everywhere():
            return False
        below = self._below()
        attn: Any = self.attn
        return (
            tuple(map(type, below)) == self._as_built
            and unwatched(below)
            and as_known(self._kinds)
            and attn.fused_attn
            and plain([p for m in (self, *below) for p in m._parameters.values()])
        )

    def drops_elements(self) -> bool:
        """Whether single elements are dropped at random, now."""
        attn: Any = self.attn
        mlp: Any = self.mlp
        rate = attn.attn_drop.p if attn.training else 0.0
        return rate > 0.0 or any(d.training and d.p > 0.0 for d in (attn.proj_drop, mlp.drop1, mlp.drop2))

    def fused(self, x: Tensor, rope: Tensor | None = None, queries: int | None = None) -> Tensor:
        """`forward` where `can_fuse`. With `queries` only the first so many tokens are computed, [B, queries, C]: the
        others are read as keys and values."""
        ops = self.ops
        attn: Any = self.attn
        mlp: Any = self.mlp
        branch, x = ops.movement.fork(x)
        if queries is not None:
            x = ops.movement.first(x, queries)
        y = attn.attend(layer_norm(ops, self.norm1, branch), rope, linear, queries)  # type: ignore[arg-type]
        x = _add(ops, x, _normed(ops, attn.norm, y), attn.proj, attn.proj_drop, self.drop_path1, self.gamma_1)
        branch, x = ops.movement.fork(x)
        y = layer_norm(ops, self.norm2, branch)  # type: ignore[arg-type]
        if isinstance(mlp, Mlp):
            y = linear(ops, mlp.fc1, y, ACTIVATIONS[mlp.act.approximate])
        else:
            y = mlp.gated(y, linear)
        y = _normed(ops, mlp.norm, dropout(ops, mlp.drop1, y))
        return _add(ops, x, y, mlp.fc2, mlp.drop2, self.drop_path2, self.gamma_2)


class EvaBlockPostNorm(CallsOps, nn.Module):
    """x + norm1(attn(x)), then x + norm2(mlp(x)): [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, norm: MakeNorm, drop_path: float) -> None:
        super().__init__()
        self.attn = attn
        self.norm1 = norm(dim)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = mlp
        self.norm2 = norm(dim)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        ops = self.ops
        x = x + call(ops, self.drop_path1, call(ops, self.norm1, self.attn(x, rope=rope)))
        return x + call(ops, self.drop_path2, call(ops, self.norm2, self.mlp(x)))


def _normed(ops: Any, norm: nn.Module, x: Tensor) -> Tensor:
    return x if isinstance(norm, nn.Identity) else layer_norm(ops, norm, x)  # type: ignore[arg-type]


def _add(
    ops: Any, x: Tensor, y: Tensor, layer: nn.Linear, drop: nn.Dropout, drop_path: nn.Module, scale: Tensor | None
) -> Tensor:
    """x + drop_path(scale * drop(layer(y))): one op unless something random stands between the branch and the sum."""
    if (drop.training and drop.p) or (drop_path.training and isinstance(drop_path, DropPath) and drop_path.drop_prob):
        branch = drop(linear(ops, layer, y))
        return x + drop_path(branch if scale is None else scale * branch)
    return ops.linear(y, layer.weight, layer.bias, None, x, scale)


know(AttentionRope, EvaAttention, GluMlp, SwiGLU, EvaBlock, EvaBlockPostNorm, Mlp, DropPath, nn.SiLU)
