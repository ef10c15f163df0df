"""One block of the transformer: attention, then an MLP, each behind a norm and added to what it was given.

Letters: B batch, N tokens, C embed_dim, H heads, D = C / H head dimension.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import DropPath, LayerNorm, Linear
from .planned import CallsOps


class Attention(CallsOps, nn.Module):
    """proj(attention(q, k, v)) with q, k, v from one packed projection: [B, N, C] -> [B, N, C]."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float, **factory: Any
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.attn_drop = attn_drop
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, residual: Tensor | None = None, queries: int | None = None) -> Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
        if self.training and self.attn_drop > 0.0:
            x = _attention_with_dropout(qkv, self.attn_drop, queries)
        else:
            x = self.ops.attention(qkv, queries=queries)  # [B, queries or N, H, D]
        return self.proj_drop(self.proj(x.flatten(2), residual=residual))


def _attention_with_dropout(qkv: Tensor, rate: float, queries: int | None) -> Tensor:
    """Attention with dropped probabilities, [B, N, H, D]: plain PyTorch, since no native backend has it."""
    q, k, v = qkv.transpose(1, 3).unbind(2)  # [B, H, N, D]
    return F.scaled_dot_product_attention(q[:, :, :queries], k, v, dropout_p=rate).transpose(1, 2)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))): [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, hidden: int, activation: str, drop: float, **factory: Any) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(dim, hidden, **factory)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden, dim, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.drop1(self.fc1(x, activation=self.activation))  # [B, N, hidden]
        return self.drop2(self.fc2(x, residual=residual))


class Block(CallsOps, nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): [B, N, C] -> [B, N, C].

    With `queries` only the first so many tokens are computed, [B, queries, C]: the others are read as keys and values.
    """

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
        self.norm1 = LayerNorm(dim, norm_eps, **factory)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, proj_drop, **factory)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, norm_eps, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation, proj_drop, **factory)
        self.drop_path2 = DropPath(drop_path)
        # In training something random stands between a branch and its addition: the two cannot be one op.
        self.branch_drops = proj_drop > 0.0 or drop_path > 0.0

    def is_as_built(self) -> bool:
        """Whether its parts are still those of this file, which know `queries`."""
        return type(self) is Block and type(self.attn) is Attention and type(self.mlp) is Mlp

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        branch, x = self.ops.movement.fork(x)
        if queries is not None:
            x = self.ops.movement.first(x, queries)
        if self.training and self.branch_drops:
            x = x + self.drop_path1(self.attn(self.norm1(branch), queries=queries))
            return x + self.drop_path2(self.mlp(self.norm2(x)))
        x = self.attn(self.norm1(branch), residual=x, queries=queries)
        branch, x = self.ops.movement.fork(x)
        return self.mlp(self.norm2(branch), residual=x)
