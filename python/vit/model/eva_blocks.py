"""The blocks of EVA-02, DINOv3 and their kin: queries and keys are rotated by position, branches may be scaled.

As in blocks.py a block runs in one of two ways: as timm writes it, every module called with timm's tensors; or, where
nobody would notice, with scales and sums inside the linear ops and no module below it called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention_rope import AttentionRope, EvaAttention
from .blocks import FusableBlock, drop_path, first_of_each
from .eva_options import EvaOptions
from .layers import DropPath
from .parts import activation_name, make_norm, norm
from .planned import CallsOps
from .quant_linear import QuantLinear
from .rows import Rows
from .torch_layers import call, know, linear


class EvaBlock(FusableBlock):
    """x + gamma_1 attn(norm1(x)), then x + gamma_2 mlp(norm2(x)): [B, N, C] -> [B, N, C]; gamma_1 and gamma_2 [C] are
    those of LayerScale, and None without init_values."""

    gamma_1: Tensor | None
    gamma_2: Tensor | None

    def __init__(
        self, options: EvaOptions, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0, **factory: Any
    ) -> None:
        super().__init__()
        dim, scaled = options.embed_dim, options.init_values is not None
        self.norm1 = make_norm(options.norm_layer, dim, options.norm_eps, **factory)
        self.attn = attn
        self.register_parameter("gamma_1", nn.Parameter(torch.empty(dim, **factory)) if scaled else None)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = make_norm(options.norm_layer, dim, options.norm_eps, **factory)
        self.mlp = mlp
        self.register_parameter("gamma_2", nn.Parameter(torch.empty(dim, **factory)) if scaled else None)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.keep_classes()

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """attn_mask, is_causal, lengths: see AttentionRope."""
        masked = attn_mask is not None or is_causal
        if isinstance(x, Tensor) and not masked and self.can_fuse():
            return self.fused(x, rope, lengths=lengths)
        ops, more = self.ops, {} if lengths is None else {"lengths": lengths}
        branch = self.attn(call(ops, self.norm1, x), rope=rope, attn_mask=attn_mask, is_causal=is_causal, **more)
        x = x + drop_path(ops, self.drop_path1, branch if self.gamma_1 is None else self.gamma_1 * branch, lengths)
        branch = self.mlp(call(ops, self.norm2, x))
        return x + drop_path(ops, self.drop_path2, branch if self.gamma_2 is None else self.gamma_2 * branch, lengths)

    def probabilities(self, x: Tensor, queries: Sequence[int], rows: Rows, rope: Tensor | None = None) -> Tensor:
        """Those of its attention for the block's input x [B, N, C]: [B, H, Q, N]."""
        attn: Any = self.attn
        return attn.probabilities(call(self.ops, self.norm1, x), queries, rows, rope)

    def can_fuse(self) -> bool:
        """Whether nobody would notice that the modules below are not called, and all are of the classes that were put
        here."""
        return type(self) is EvaBlock and self._may_pass_over()

    def fused(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        queries: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """`forward` where `can_fuse`. With `queries` only the first `queries` tokens (of each image) are
        computed, [B, queries, C]: all tokens are keys and values."""
        ops = self.ops
        attn: Any = self.attn
        mlp: Any = self.mlp
        branch, x = ops.movement.fork(x)
        if queries is not None:
            x = first_of_each(ops, x, queries, lengths)
        y = norm(ops, attn.norm, attn.attend(norm(ops, self.norm1, branch), rope, linear, queries, lengths=lengths))
        x = _add(ops, x, y, attn.proj, attn.proj_drop, self.drop_path1, self.gamma_1, lengths)
        branch, x = ops.movement.fork(x)
        y = mlp.inner(norm(ops, self.norm2, branch), activation_name(mlp.act))
        return _add(ops, x, y, mlp.fc2, mlp.drop2, self.drop_path2, self.gamma_2, lengths)


class EvaBlockPostNorm(CallsOps, nn.Module):
    """x + norm1(attn(x)), then x + norm2(mlp(x)): [B, N, C] -> [B, N, C]."""

    def __init__(
        self, options: EvaOptions, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0, **factory: Any
    ) -> None:
        super().__init__()
        dim = options.embed_dim
        self.attn = attn
        self.norm1 = make_norm(options.norm_layer, dim, options.norm_eps, **factory)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = mlp
        self.norm2 = make_norm(options.norm_layer, dim, options.norm_eps, **factory)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """attn_mask, is_causal, lengths: see AttentionRope."""
        ops, more = self.ops, {} if lengths is None else {"lengths": lengths}
        y = self.attn(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal, **more)
        x = x + drop_path(ops, self.drop_path1, call(ops, self.norm1, y), lengths)
        return x + drop_path(ops, self.drop_path2, call(ops, self.norm2, self.mlp(x)), lengths)

    def probabilities(self, x: Tensor, queries: Sequence[int], rows: Rows, rope: Tensor | None = None) -> Tensor:
        """Those of its attention for the block's input x [B, N, C]: [B, H, Q, N]."""
        attn: Any = self.attn
        return attn.probabilities(x, queries, rows, rope)


def _add(
    ops: Any,
    x: Tensor,
    y: Tensor,
    layer: nn.Linear | QuantLinear,
    drop: nn.Dropout,
    path: nn.Module,
    scale: Tensor | None,
    lengths: Sequence[int] | None,
) -> Tensor:
    """x + drop_path(scale * drop(layer(y))): one op unless something random stands between the branch and the sum."""
    if (drop.training and drop.p) or (path.training and isinstance(path, DropPath) and path.drop_prob):
        branch = drop(linear(ops, layer, y))
        return x + drop_path(ops, path, branch if scale is None else scale * branch, lengths)
    return linear(ops, layer, y, None, x, scale)


know(AttentionRope, EvaAttention, EvaBlock, EvaBlockPostNorm)
