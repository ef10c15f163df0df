"""Pooling by attention: one learned query reads the tokens (arXiv:2205.01917, section 2.1; SigLIP's "MAP" head)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .mlp import Mlp
from .options import Options
from .parts import make_norm
from .planned import CallsOps
from .rows import Rows
from .torch_layers import call, know, untouched


class AttentionPoolLatent(CallsOps, nn.Module):
    """y + mlp(norm(y)) with y = proj(attention(q(latent), kv(x))): tokens [B, N, C] -> [B, C]. Names are timm's."""

    def __init__(self, options: Options, **factory: Any) -> None:
        super().__init__()
        dim = options.embed_dim
        self.num_heads = options.num_heads
        self.head_dim = dim // options.num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim, **factory))
        self.q = nn.Linear(dim, dim, **factory)
        self.kv = nn.Linear(dim, 2 * dim, **factory)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(0.0)
        self.norm = make_norm(options.norm_layer, dim, options.norm_eps, **factory)
        self.mlp = Mlp(replace(options, proj_bias=True, proj_drop_rate=0.0, scale_mlp_norm=False), **factory)

    def forward(self, x: Tensor) -> Tensor:
        ops = self.ops
        y = ops.attention(*self._project(x)).flatten(2)  # [B, 1, C]
        y = call(ops, self.proj_drop, call(ops, self.proj, y))
        return (y + self.mlp(call(ops, self.norm, y)))[:, 0]

    def probabilities(self, x: Tensor, rows: Rows) -> Tensor:
        """What the learned query gives each token: x [B, N, C] -> softmax(scale q k^T) [B, H, 1, N]."""
        q, k, _ = self._project(x)
        return rows(q, k, [0], self.head_dim**-0.5)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, 1, H, D], k and v [B, N, H, D]."""
        ops = self.ops
        heads = self.num_heads, self.head_dim
        if untouched(self.q, nn.Linear):
            q = call(ops, self.q, self.latent).expand(x.shape[0], -1, -1)  # one row, whatever the batch
        else:
            q = call(ops, self.q, self.latent.expand(x.shape[0], -1, -1))
        q = q.unflatten(2, heads)  # [B, 1, H, D]
        k, v = call(ops, self.kv, x).unflatten(2, (2, *heads)).unbind(2)  # [B, N, H, D]
        if not (untouched(self.q_norm, nn.Identity) and untouched(self.k_norm, nn.Identity)):
            q = call(ops, self.q_norm, q.transpose(1, 2)).transpose(1, 2)
            k = call(ops, self.k_norm, k.transpose(1, 2)).transpose(1, 2)
        return q, k, v


know(AttentionPoolLatent)
