"""What the launchers of the ops share: addresses, contiguous memory, scratch memory, and the routine `move`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import NativeBackend
from ..backends import expect as _expect

#: The fields of vit::Move, in the order in which `move` gives them.
_expect("move", "a lead b out sizes leads terms term divisor dtype context")


def ptr(tensor: Tensor | None) -> int:
    """Address of the first element; 0 stands for "not given"."""
    return 0 if tensor is None else tensor.data_ptr()


#: The least positive float32.
_LEAST = 2.0**-149


def kept_positive(eps: float, dtype: torch.dtype) -> float:
    """eps, or the least that float32 has where a smaller one would be 0 in it: a row of zeros over sqrt(0 + 0) is NaN.
    Sums of every dtype but float64 are float32."""
    return _LEAST if 0 < eps < _LEAST and dtype != torch.float64 else eps


def launch(
    backend: NativeBackend, kernel: Callable[..., int | None], fields: tuple[Any, ...], device: torch.device
) -> None:
    """Calls a kernel that needs scratch memory; `fields` are those in front of workspace and context.

    Scratch memory that a backend keeps is offered first; a kernel that needs more says how much and does nothing.
    """
    context = backend.context(device)
    needed = kernel(*fields, *backend.scratch(device), *context)
    if needed is not None:
        memory = backend.workspace(needed, device)
        kernel(*fields, memory.data_ptr(), needed, *context)


def contiguous(backend: NativeBackend, x: Tensor) -> Tensor:
    """`x`, or a contiguous copy of it, made by the backend where it can."""
    if x.is_contiguous():
        return x
    return move(backend, x.shape, x) if movable(backend, x) else x.contiguous()


def rows(backend: NativeBackend, x: Tensor) -> tuple[Tensor, int]:
    """`x` [..., C] as rows of adjacent elements and the distance between rows; copies only when it must."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x, x.stride(0)
    return contiguous(backend, x), x.shape[-1]


def zeros(backend: NativeBackend, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of zeros, written by the backend where it can."""
    out = backend.empty(shape, dtype, device)
    if not backend.moves:
        return out.zero_()
    move_into(backend, out.view(-1), None)
    return out


def movable(backend: NativeBackend, x: Tensor) -> bool:
    """Whether `move` can read this view: not empty, of a dtype of the backend, 1 to 6 dimensions."""
    return backend.moves and 0 < x.dim() <= 6 and x.dtype in backend.dtypes and x.numel() > 0


def move(
    backend: NativeBackend,
    shape: Sequence[int],
    a: Tensor | None,
    lead: Tensor | None = None,
    b: Tensor | None = None,
    *,
    leads: int = 0,
    terms: int = 1,
    term: int = 0,
    divisor: float = 1,
) -> Tensor:
    """A new tensor of `shape` (1 to 6 dimensions): [lead; a] along dimension 1, plus b.

    a, lead (of `leads` entries) and b are views of as many dimensions, None stands for zeros. With `terms` > 1 the
    views a, `term` elements apart in memory, are added up in order. The sum is divided by `divisor`.
    """
    given = next(t for t in (a, lead, b) if t is not None)
    out = backend.empty(shape, given.dtype, given.device)
    move_into(backend, out, a, lead, b, leads, terms, term, divisor)
    return out


def move_into(
    backend: NativeBackend,
    out: Tensor,
    a: Tensor | None,
    lead: Tensor | None = None,
    b: Tensor | None = None,
    leads: int = 0,
    terms: int = 1,
    term: int = 0,
    divisor: float = 1,
) -> None:
    """`move` into memory that is there, contiguous."""
    kernel: Callable[..., None] = backend.lib.move  # mypy does not know how many numbers a tuple of sizes has
    kernel(
        *_view(a), *_view(lead), *_view(b),
        out.data_ptr(), *_six(out.shape, 1), leads, terms, term, divisor,
        backend.codes[out.dtype], *backend.context(out.device),
    )  # fmt: skip


def _view(x: Tensor | None) -> tuple[int, ...]:
    """The fields of a vit::View."""
    return _NOTHING if x is None else (x.data_ptr(), *_six(x.stride(), 0))


_NOTHING = (0,) * 7


def _six(values: Sequence[int], fill: int) -> Sequence[int]:
    """Sizes or strides of 1 to 6 dimensions as those of 6: the first two stay the first, the last stays the last."""
    count = len(values)
    if count == 6:
        return values
    front = min(2, count - 1)
    return (*values[:front], *(fill,) * (6 - count), *values[front:])


def row_count(shape: Sequence[int]) -> int:
    """How many rows a tensor [..., C] has."""
    return math.prod(shape[:-1])


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulator type of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast wants for matrix products of `x`; None when it is off or leaves `x` alone (float64, meta)."""
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
