"""One block of the transformer: attention, then an MLP, each behind a norm and added to what it was given.

A block runs in one of two ways. As timm writes it: every module is called with one tensor, and the sums stand outside;
so hooks, adapters, wrappers and replaced modules see and do what they would in timm. Or, where nobody would notice,
with the activation and the sums inside the linear ops and no module below it called (a third of the passes over the
activations, and 30 us less per block in Python).

Letters: B batch, N tokens, C embed_dim, H heads, D = C / H head dimension.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import DropPath
from .planned import CallsOps
from .torch_layers import (
    ACTIVATIONS,
    as_known,
    call,
    dropout,
    know,
    layer_norm,
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

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float, **factory: Any
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5  # as in timm, of probabilities that exist
        self.fused_attn = True
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = nn.Identity()
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        ops = self.ops
        B, N, _ = x.shape
        qkv = call(ops, self.qkv, x).reshape(B, N, 3, self.num_heads, self.head_dim)
        if isinstance(x, Tensor) and self.fused_attn and self._norms_are_identities():
            x = self.attend(qkv)  # [B, N, H, D]
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
            x = self._attend_unpacked(call(ops, self.q_norm, q), call(ops, self.k_norm, k), v)
        x = call(ops, self.norm, x.flatten(2))
        return call(ops, self.proj_drop, call(ops, self.proj, x))

    def attend(self, qkv: Tensor, queries: int | None = None) -> Tensor:
        """A packed projection [B, N, 3, H, D] -> [B, queries or N, H, D]; with dropped probabilities in PyTorch."""
        rate = self.attn_drop.p if self.training else 0.0
        if rate == 0.0:
            return self.ops.attention(qkv, queries=queries)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # [B, H, N, D]
        return F.scaled_dot_product_attention(q[:, :, :queries], k, v, dropout_p=rate).transpose(1, 2)

    def _attend_unpacked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, N, D] -> [B, N, H, D]."""
        if not self.fused_attn:
            probabilities = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
            return (self.attn_drop(probabilities) @ v).transpose(1, 2)
        rate = self.attn_drop.p if self.training else 0.0
        if isinstance(q, Tensor) and watching_functions():
            with planned(self.ops):
                return F.scaled_dot_product_attention(q, k, v, dropout_p=rate).transpose(1, 2)
        if rate == 0.0 and isinstance(q, Tensor):
            return self.ops.attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate).transpose(1, 2)

    def _norms_are_identities(self) -> bool:
        return untouched(self.q_norm, nn.Identity) and untouched(self.k_norm, nn.Identity)


class Mlp(CallsOps, nn.Module):
    """fc2(act(fc1(x))): [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, hidden: int, activation: str, drop: float, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.act = nn.GELU(approximate="tanh" if activation == "gelu_tanh" else "none")
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        ops, fc1, act = self.ops, self.fc1, self.act
        alone = isinstance(x, Tensor) and untouched(fc1, nn.Linear) and untouched(act, nn.GELU)
        if alone and plain([x, *fc1._parameters.values()]):
            x = linear(ops, fc1, x, ACTIVATIONS[act.approximate])  # [B, N, hidden]
        else:
            x = call(ops, act, call(ops, fc1, x))
        x = call(ops, self.norm, call(ops, self.drop1, x))
        return call(ops, self.drop2, call(ops, self.fc2, x))


class Block(CallsOps, nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): [B, N, C] -> [B, N, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        activation: str = "gelu",
        norm_eps: float = 1e-6,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps, **factory)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, proj_drop, **factory)
        self.ls1 = nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, norm_eps, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation, proj_drop, **factory)
        self.ls2 = nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and self.can_fuse():
            return self.fused(x)
        ops = self.ops
        x = x + call(ops, self.drop_path1, call(ops, self.ls1, self.attn(call(ops, self.norm1, x))))
        return x + call(ops, self.drop_path2, call(ops, self.ls2, self.mlp(call(ops, self.norm2, x))))

    def can_fuse(self) -> bool:
        """Whether nobody would notice that the modules below are not called, and all are what this file makes."""
        own = self._modules
        attn, mlp = own.get("attn"), own.get("mlp")
        if type(self) is not Block or type(attn) is not Attention or type(mlp) is not Mlp or watched_everywhere():
            return False
        below: list[Any] = [*own.values(), *attn._modules.values(), *mlp._modules.values()]
        return (
            tuple(map(type, below)) in _AS_BUILT
            and unwatched(below)
            and as_known(_KINDS)
            and attn.fused_attn
            and plain([p for m in below for p in m._parameters.values()])
        )

    def drops_elements(self) -> bool:
        """Whether single elements are dropped at random, now."""
        attn, mlp = self.attn, self.mlp
        rate = attn.attn_drop.p if attn.training else 0.0
        return rate > 0.0 or any(d.training and d.p > 0.0 for d in (attn.proj_drop, mlp.drop1, mlp.drop2))

    def fused(self, x: Tensor, queries: int | None = None) -> Tensor:
        """`forward` where `can_fuse`. With `queries` only the first so many tokens are computed, [B, queries, C]: the
        others are read as keys and values."""
        ops, attn, mlp = self.ops, self.attn, self.mlp
        branch, x = ops.movement.fork(x)
        if queries is not None:
            x = ops.movement.first(x, queries)
        qkv = linear(ops, attn.qkv, layer_norm(ops, self.norm1, branch))
        qkv = qkv.view(*branch.shape[:2], 3, attn.num_heads, attn.head_dim)
        y = attn.attend(qkv, queries).flatten(2)
        x = _add(ops, x, y, attn.proj, attn.proj_drop, self.drop_path1)
        branch, x = ops.movement.fork(x)
        y = linear(ops, mlp.fc1, layer_norm(ops, self.norm2, branch), ACTIVATIONS[mlp.act.approximate])
        return _add(ops, x, dropout(ops, mlp.drop1, y), mlp.fc2, mlp.drop2, self.drop_path2)


def _add(ops: Any, x: Tensor, y: Tensor, layer: nn.Linear, drop: nn.Dropout, drop_path: nn.Module) -> Tensor:
    """x + drop_path(drop(layer(y))): one op unless something random stands between the branch and the sum."""
    if (drop.training and drop.p) or (drop_path.training and isinstance(drop_path, DropPath) and drop_path.drop_prob):
        return x + drop_path(drop(linear(ops, layer, y)))
    return linear(ops, layer, y, None, x)


def _kinds(drop_path: type) -> tuple[type, ...]:
    block = nn.LayerNorm, Attention, nn.Identity, drop_path, nn.LayerNorm, Mlp, nn.Identity, drop_path
    attn = nn.Linear, nn.Identity, nn.Identity, nn.Dropout, nn.Identity, nn.Linear, nn.Dropout
    return *block, *attn, nn.Linear, nn.GELU, nn.Dropout, nn.Identity, nn.Linear, nn.Dropout


#: The classes of the modules of a block in order, without and with drop-path.
_AS_BUILT = (_kinds(nn.Identity), _kinds(DropPath))
_KINDS = tuple(dict.fromkeys((Block, *_kinds(DropPath))))
know(*_KINDS)
