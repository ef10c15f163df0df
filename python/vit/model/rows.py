"""Rows of a model's attention: which backend computes them is planned when they are asked for, not with the forward,
since a backend may lack what the forward does not need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backends import Spec
from ..ops._attention_rows import softmax_rows
from ..plan import make_plan
from .planned import Planned

#: (q, k, queries, scale) -> softmax(scale q k^T) of those queries, as vit.ops.attention_rows.
Rows = Callable[[Tensor, Tensor | None, Sequence[int], float], Tensor]


def attention_rows_of(model: Planned, head_dim: int) -> Rows:
    """vit.ops.attention_rows on the model's backend; in PyTorch where a gradient is wanted, which the routine has not.

    Raises BackendError when the backend was named and cannot run it.
    """
    sizes = {"q": ("*", "*", "*", head_dim)}
    device = model.device
    spec = Spec(
        "attention_rows", model.dtype, sizes, training=False, device_type=device.type, device_index=device.index
    )
    routine = make_plan(model.backend, [spec], f"rows of attention of {model.name}").ops.attention_rows

    def rows(q: Tensor, k: Tensor | None, queries: Sequence[int], scale: float) -> Tensor:
        wanted = torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad))
        return (softmax_rows if wanted else routine)(q, k, queries, scale)

    return rows
