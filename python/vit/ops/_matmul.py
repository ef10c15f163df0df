"""The matrix product, with broadcast batch dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import NativeBackend, Spec
from .bound import call
from .launch import autocast_dtype, contiguous, launch, ptr
from .op import Op


def matmul(a: Tensor, b: Tensor, backend: str = "auto") -> Tensor:
    """The product of two matrices, or of each pair of two batches of matrices.

    c[..., m, n] = sum_k a[..., m, k] b[..., k, n]

    a [..., M, K], b [..., K, N]; batch dimensions broadcast and vectors are taken as torch.matmul takes them;
    K = 0 gives zeros. c [..., M, N], contiguous. Under autocast both are cast to its dtype.
    Raises ValueError for sizes or dtypes that do not fit, BackendError when the named backend cannot run it.
    """
    return call(OP, backend, a=a, b=b)


def reference(a: Tensor, b: Tensor) -> Tensor:
    """The formula in PyTorch."""
    return torch.matmul(a, b)


def limits(spec: Spec) -> list[str]:
    """None but those of the backend."""
    return []


# ----- native


def arguments(a: Tensor, b: Tensor) -> tuple[tuple[Any, ...], Callable[[Tensor], Tensor]]:
    """a [batch, M, K] and b [batch, K, N]; the product gets the wanted shape afterwards."""
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
    """The product of the sizes; torch.compile does not trace math.prod over its symbols."""
    count = 1
    for n in shape:
        count = count * n
    return count


FWD = "(Tensor a, Tensor b, bool save) -> Tensor c"
FWD_FIELDS = "a b c batch M N K dtype workspace context"
BWD = "(Tensor dc, Tensor a, Tensor b, bool[2] mask) -> (Tensor da, Tensor db)"
BWD_FIELDS = "dc a b da db batch M N K dtype workspace context"


def fwd_fake(a: Tensor, b: Tensor, save: bool) -> Tensor:
    """c [batch, M, N]."""
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def launch_fwd(backend: NativeBackend, a: Tensor, b: Tensor, save: bool) -> Tensor:
    """c [batch, M, N]; nothing is saved."""
    batch, m, k = a.shape
    n, dtype, device = b.shape[2], a.dtype, a.device
    c = backend.empty((batch, m, n), dtype, device)
    fields = (*_matrix(a), *_matrix(b), ptr(c), batch, m, n, k, backend.codes[dtype])
    launch(backend, backend.lib.matmul_fwd, fields, device)
    return c


def bwd_fake(dc: Tensor, a: Tensor, b: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor]:
    """da [batch, M, K], db [batch, K, N]."""
    return dc.new_empty(a.shape if mask[0] else (0,)), dc.new_empty(b.shape if mask[1] else (0,))


def launch_bwd(
    backend: NativeBackend, dc: Tensor, a: Tensor, b: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """da [batch, M, K] and db [batch, K, N], each where `mask` wants it."""
    dc = contiguous(backend, dc)
    batch, m, k = a.shape
    n, dtype, device = b.shape[2], a.dtype, a.device
    da = backend.empty(a.shape, dtype, device) if mask[0] else None
    db = backend.empty(b.shape, dtype, device) if mask[1] else None
    fields = (ptr(dc), *_matrix(a), *_matrix(b), ptr(da), ptr(db), batch, m, n, k, backend.codes[dtype])
    launch(backend, backend.lib.matmul_bwd, fields, device)
    return da, db


def _matrix(x: Tensor) -> tuple[int, ...]:
    """The fields of a vit::Matrix."""
    return (x.data_ptr(), *x.stride())


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keeps a and b."""
    ctx.save_for_backward(*args)


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    """da, db."""
    a, b = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:2])
    grads = kernel(dy, a, b, mask)
    return tuple(g if wanted else None for g, wanted in zip(grads, mask, strict=True))


OP = Op(
    name="matmul",
    reference=reference,
    limits=limits,
    arguments=arguments,
    fwd_schema=FWD,
    fwd_fake=fwd_fake,
    launch_fwd=launch_fwd,
    fwd_fields=FWD_FIELDS,
    bwd_schema=BWD,
    bwd_fake=bwd_fake,
    launch_bwd=launch_bwd,
    bwd_fields=BWD_FIELDS,
    save=save,
    backward=backward,
    autocasts=True,
)
