"""The matrix product, with broadcast batch dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import DTYPE_CODES, NativeBackend, Spec
from .op import Op, autocast_dtype, call, launch, ptr


def matmul(a: Tensor, b: Tensor, backend: str = "auto") -> Tensor:
    """The product of two matrices, or of each pair of two batches of matrices.

    c[..., m, n] = sum_k a[..., m, k] b[..., k, n]

    a [..., M, K], b [..., K, N]; batch dimensions broadcast and vectors are taken as torch.matmul takes them;
    K = 0 gives zeros. c [..., M, N], contiguous. Under autocast both are cast to its dtype.
    Raises ValueError for sizes or dtypes that do not fit, BackendError when the named backend cannot run it.
    """
    return call(OP, backend, a=a, b=b)


def reference(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def limits(spec: Spec) -> list[str]:
    return []


# ----- native


def arguments(a: Tensor, b: Tensor) -> tuple[tuple[Any, ...], Callable[[Tensor], Tensor]]:
    if a.dim() == 0 or b.dim() == 0:
        raise ValueError(f"vit.ops.matmul: both arguments need a dimension, got {list(a.shape)} and {list(b.shape)}")
    if (dtype := autocast_dtype(a)) is not None and b.dtype != torch.float64:
        a, b = a.to(dtype), b.to(dtype)
    if a.dtype != b.dtype:
        raise ValueError(f"vit.ops.matmul: a and b must have one dtype, got {a.dtype} and {b.dtype}")
    rows, columns = a.dim() > 1, b.dim() > 1  # a vector stands for one row of a, one column of b
    a, b = a if rows else a.unsqueeze(0), b if columns else b.unsqueeze(1)
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"vit.ops.matmul: the last dimension of a {list(a.shape)} must equal the last but one of b {list(b.shape)}"
        )
    try:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"vit.ops.matmul: batch dimensions {list(a.shape[:-2])} and {list(b.shape[:-2])} do not broadcast"
        ) from None
    shape = [*batch, *([a.shape[-2]] if rows else []), *([b.shape[-1]] if columns else [])]
    if b.dim() == 2:  # one right-hand side for all: the batch is just more rows
        a, b = a.reshape(1, _size(a.shape[:-1]), a.shape[-1]), b.unsqueeze(0)
    else:
        count = _size(batch)
        a = a.expand(*batch, *a.shape[-2:]).reshape(count, *a.shape[-2:])
        b = b.expand(*batch, *b.shape[-2:]).reshape(count, *b.shape[-2:])
    return (a, b), lambda c: c.reshape(shape)


def _size(shape: Any) -> int:
    count = 1
    for n in shape:
        count = count * n
    return count


FWD = "(Tensor a, Tensor b, bool save) -> Tensor c"
BWD = "(Tensor dc, Tensor a, Tensor b, bool[2] mask) -> (Tensor da, Tensor db)"


def fwd_fake(a: Tensor, b: Tensor, save: bool) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def fwd(backend: NativeBackend, a: Tensor, b: Tensor, save: bool) -> Tensor:
    c = backend.empty((a.shape[0], a.shape[1], b.shape[2]), a.dtype, a.device)

    pointers = (ptr(a), ptr(b), ptr(c))
    values = _sizes(backend, a, b)
    launch(backend, backend.lib.matmul_fwd, backend.lib.matmul_fwd_workspace, pointers, values, a.device)
    return c


def bwd_fake(dc: Tensor, a: Tensor, b: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor]:
    return dc.new_empty(a.shape if mask[0] else (0,)), dc.new_empty(b.shape if mask[1] else (0,))


def bwd(
    backend: NativeBackend, dc: Tensor, a: Tensor, b: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    da = backend.empty(a.shape, dc.dtype, dc.device) if mask[0] else None
    db = backend.empty(b.shape, dc.dtype, dc.device) if mask[1] else None

    pointers = (ptr(dc), ptr(a), ptr(b), ptr(da), ptr(db))
    values = _sizes(backend, a, b)
    launch(backend, backend.lib.matmul_bwd, backend.lib.matmul_bwd_workspace, pointers, values, a.device)
    return da, db


def _sizes(backend: NativeBackend, a: Tensor, b: Tensor) -> tuple[Any, ...]:
    batch, m, k = a.shape
    return batch, m, b.shape[2], k, *a.stride(), *b.stride(), DTYPE_CODES[a.dtype], *backend.context(a.device)


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*args)


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:2])
    grads = kernel(dy, a, b, mask)
    return tuple(g if wanted else None for g, wanted in zip(grads, mask, strict=True))


OP = Op("matmul", reference, arguments, FWD, fwd_fake, fwd, BWD, bwd_fake, bwd, save, backward, limits)
