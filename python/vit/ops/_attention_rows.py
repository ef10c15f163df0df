"""Rows of attention's probabilities, for those who look at them: a forward alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import NativeBackend, Spec
from ._attention import _adjacent, _calls, _check_lengths, _heads, _shapes, _split
from ._attention import limits as _limits_of_attention
from .bound import call
from .launch import acc_dtype, launch, ptr
from .routine import Routine

_OP = "vit.ops.attention_rows"


def attention_rows(
    q: Tensor,
    k: Tensor | None = None,
    queries: Sequence[int] | None = None,
    scale: float | None = None,
    lengths: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """The probabilities with which attention weighs the values, of chosen queries.

    rows[b, h, r, l] = softmax_l(scale q[b, queries[r], h] . k[b, l, h]), scale = 1 / sqrt(D) unless given.

    q [B, N, H, D]; k [B, L, H, D], any strides on B, N (L) and H; without k, q is the packed projection [B, N, 3, H, D]
    itself. queries: R tokens from 0 to N - 1 in any order, None: all. rows [B, H, R, L], float64 for float64, else
    float32. No other row is computed. `lengths`: B is 1, and the N tokens of q and k are those of several images, one
    behind another, lengths[i] of image i: queries are then needed, they count the tokens of each image, and the columns
    of an image hold the rows of its own call. A row times the values is the output of vit.ops.attention.
    There is no backward. Raises ValueError for sizes, dtypes or queries that do not fit, BackendError when the named
    backend cannot run it or a gradient is wanted.
    """
    return call(OP, backend, q=q, k=k, queries=queries, scale=scale, lengths=lengths)


def softmax_rows(
    q: Tensor,
    k: Tensor | None = None,
    queries: Sequence[int] | None = None,
    scale: float | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """The formula in PyTorch, which has gradients."""
    _check(q, k, queries, lengths)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if lengths is not None:
        images = zip(_split(q, lengths), _split(k, lengths), strict=True)
        return torch.cat([softmax_rows(a, b, queries, scale) for a, b in images if a is not None], dim=-1)
    q, k = _unpacked(q, k)
    if queries is not None:
        first = _first_of_neighbours(queries)
        q = q[:, list(queries)] if first is None else q[:, first : first + len(queries)]
    q, k = (t.transpose(1, 2).to(acc_dtype(t.dtype)) for t in (q, k))
    return (q * scale @ k.mT).softmax(dim=-1)


def limits(spec: Spec) -> list[str]:
    """Head dimensions that no kernel has."""
    return (["it has no backward"] if spec.training else []) + _limits_of_attention(spec)


def arguments(
    q: Tensor,
    k: Tensor | None = None,
    queries: Sequence[int] | None = None,
    scale: float | None = None,
    lengths: Sequence[int] | None = None,
) -> tuple[tuple[Any, ...], None]:
    """q and k of one dtype, or a packed q alone; the queries, the scale, the lengths."""
    _check(q, k, queries, lengths)
    if too_wide := _limits_of_attention(Spec("attention_rows", q.dtype, {"q": tuple(q.shape)})):
        raise ValueError(f'{_OP}: {too_wide[0]}, got {_shapes(q, k, None)}; use backend="reference"')
    if k is not None and k.dtype != q.dtype:
        raise ValueError(f"{_OP}: q and k must have one dtype, got {q.dtype} and {k.dtype}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = None if queries is None else list(queries)
    return (q, k, chosen, scale, None if lengths is None else list(lengths)), None


def _check(q: Tensor, k: Tensor | None, queries: Sequence[int] | None, lengths: Sequence[int] | None) -> None:
    """ValueError unless it is q and k of sizes that go together, or a packed q alone, and tokens that are there."""
    if k is None and (q.dim() != 5 or q.shape[2] != 3):
        raise ValueError(f"{_OP}: give q and k, or one packed q [B, N, 3, H, D] alone, got {_shapes(q, k, None)}")
    if k is not None and (q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]):
        raise ValueError(f"{_OP}: q [B, N, H, D] and k [B, L, H, D] differ in B, H or D, got {_shapes(q, k, None)}")
    if lengths is not None:
        _check_lengths(q, k, None, lengths, _OP)
        if queries is None:
            raise ValueError(f"{_OP}: with lengths, queries must be given: the same tokens of every image")
    tokens = q.shape[1] if lengths is None else min(lengths)
    for query in queries or ():
        if isinstance(query, bool) or not isinstance(query, int):
            raise TypeError(f"{_OP}: queries must be a list or tuple of integers, got {query!r} in it")
        if not 0 <= query < tokens:
            of = "q" if lengths is None else "the shortest image"
            raise ValueError(f"{_OP}: queries must be within 0..{tokens - 1}, the tokens of {of}, got {query}")


def _unpacked(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    """q [B, N, H, D] and k [B, L, H, D], as given or views of a packed q [B, N, 3, H, D]."""
    if k is not None:
        return q, k
    q, k, _ = q.unbind(2)
    return q, k


SCHEMA = "(Tensor q, Tensor? k, int[]? queries, float scale, SymInt[]? lengths) -> Tensor"
FIELDS = "q k queries rows B N R L H D scale dtype workspace context"


def fake(
    q: Tensor, k: Tensor | None, queries: Sequence[int] | None, scale: float, lengths: Sequence[int] | None
) -> Tensor:
    """rows [B, H, R, L]."""
    q, k = _unpacked(q, k)
    b, n, h, _ = q.shape
    count = n if queries is None else len(queries)
    return q.new_empty((b, h, count, k.shape[1]), dtype=acc_dtype(q.dtype))


def launcher(
    backend: NativeBackend,
    q: Tensor,
    k: Tensor | None,
    queries: Sequence[int] | None,
    scale: float,
    lengths: Sequence[int] | None,
) -> Tensor:
    """rows [B, H, R, L] of a compiled backend."""
    q, k = (_adjacent(backend, t) for t in _unpacked(q, k))
    device, (_, n, h, d) = q.device, q.shape
    first, index, count = _chosen(queries, n, device)
    rows = backend.empty((q.shape[0], h, count, k.shape[1]), acc_dtype(q.dtype), device)
    every, head, row, _ = rows.stride()
    for images, token, _, own, keys, step in _calls(q, k, None, lengths):
        place = rows.data_ptr() + token * rows.element_size(), every if step is None else step, row, head
        fields = (
            *_heads(q, token + first, step), *_heads(k, token, step), ptr(index), *place,
            images, own - first, count, keys, h, d, scale, backend.codes[q.dtype],
        )  # fmt: skip
        launch(backend, backend.lib.attention_rows, fields, device)
    return rows


def _chosen(queries: Sequence[int] | None, tokens: int, device: torch.device) -> tuple[int, Tensor | None, int]:
    """The first of the queries, their numbers on the device where they are needed, how many there are."""
    if queries is None:
        return 0, None, tokens
    if (first := _first_of_neighbours(queries)) is not None:
        return first, None, len(queries)
    return 0, torch.tensor(queries, dtype=torch.int64, device=device), len(queries)


def _first_of_neighbours(queries: Sequence[int]) -> int | None:
    """The first of queries that follow each other; None of others. Neighbours need no list of numbers on the device,
    and so no copy to a GPU, which a graph of launches could not hold."""
    first = queries[0] if queries else 0
    return first if list(queries) == list(range(first, first + len(queries))) else None


OP = Routine(
    name="attention_rows",
    reference=softmax_rows,
    limits=limits,
    arguments=arguments,
    schema=SCHEMA,
    fake=fake,
    launcher=launcher,
    fields=FIELDS,
    differentiable="compute softmax(scale q k^T) in PyTorch",
)
