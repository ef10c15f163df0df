"""What a model does between its ops: patches cut, tokens put together, gradients added where a tensor has two users.

Plain PyTorch, except on a backend whose threads are the CPU's: there the backend's routine `move` does it. Each
parallel region of PyTorch leaves OpenMP workers behind that spin on the cores the next kernel needs, and a forked child
that opens one waits for ever. Not an op of OPS: nothing is computed here that another backend would have to match, and
no plan can refuse it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..backends import NativeBackend
from .bound import batched, ordinary, transform
from .launch import contiguous, move, move_into
from .repeat import Again, Learn, repeated, repeats


class Movement:
    """The functions in plain PyTorch."""

    backend = "auto"

    def __reduce__(self) -> tuple[Any, ...]:
        return of, (self.backend,)

    def __deepcopy__(self, memo: Any) -> Movement:
        return self

    def contiguous(self, view: Tensor) -> Tensor:
        """A copy of a view [...] in the order of its dimensions."""
        return view.contiguous()

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x for two users; in the backward their gradients are added."""
        return x, x

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        """The three views [B, N, H, D] of a packed projection [B, N, 3, H, D]."""
        return packed.unbind(2)

    def tokens(self, patches: Tensor, prefix: Tensor | None, position: Tensor | None) -> Tensor:
        """[prefix; patches] + position: patches [B, n, C], prefix [1, k, C] or None, position [1, k + n, C] or None."""
        if prefix is not None:
            patches = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], dim=1)
        return patches if position is None else patches + position

    def first(self, tokens: Tensor, count: int) -> Tensor:
        """The first `count` tokens of each sample: [B, N, C] -> [B, count, C]."""
        return tokens[:, :count]

    def join(self, images: Sequence[Tensor]) -> Tensor:
        """Tokens of several images [1, n, C], one behind another: [1, sum of n, C]."""
        return torch.cat(list(images), dim=1)

    def split(self, tokens: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
        """The reverse of join: [1, sum of lengths, C] -> [1, n, C] of each."""
        return tokens.split(list(lengths), dim=1)

    def mean(self, tokens: Tensor, skip: int) -> Tensor:
        """The mean of all tokens but the first `skip`: [B, N, C] -> [B, C]."""
        return tokens[:, skip:].mean(dim=1)


class KernelMovement(Movement):
    """The functions on a backend that has `move`; in plain PyTorch where something traces or looks on."""

    def __init__(self, record: NativeBackend) -> None:
        self.record, self.backend = record, record.name

    @cached_property
    def repeats(self) -> tuple[Again, Learn]:
        """The calls that were made before."""
        return repeats(self.record)

    @repeated
    def contiguous(self, view: Tensor) -> Tensor:
        if view.is_contiguous() or view.dim() > 6 or not self._movable(view):
            return super().contiguous(view)
        return _Contiguous.apply(self.record, view) if _graph(view) else move(self.record, view.shape, view)

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not (_graph(x) and self._movable(x)):
            return super().fork(x)
        return _Fork.apply(self.record, x)

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        if not (_graph(packed) and self._movable(packed)):
            return super().unpack(packed)
        return _Unpack.apply(self.record, packed)

    @repeated
    def tokens(self, patches: Tensor, prefix: Tensor | None, position: Tensor | None) -> Tensor:
        if (prefix is None and position is None) or not self._movable(patches, prefix, position):
            return super().tokens(patches, prefix, position)
        if _graph(patches, prefix, position):
            return _Tokens.apply(self.record, patches, prefix, position)
        return _put_together(self.record, patches, prefix, position)

    @repeated
    def first(self, tokens: Tensor, count: int) -> Tensor:
        if not self._movable(tokens) or tokens.shape[1] <= count:
            return super().first(tokens, count)
        if _graph(tokens):
            return _First.apply(self.record, tokens, count)
        first = tokens[:, :count]
        return move(self.record, first.shape, first)

    def join(self, images: Sequence[Tensor]) -> Tensor:
        if not self._movable(*images):
            return super().join(images)
        return _Join.apply(self.record, *images) if _graph(*images) else _joined(self.record, images)

    def split(self, tokens: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
        if not (_graph(tokens) and self._movable(tokens)):
            return super().split(tokens, lengths)
        return _Split.apply(self.record, tokens, list(lengths))

    @repeated
    def mean(self, tokens: Tensor, skip: int) -> Tensor:
        if not self._movable(tokens) or tokens.shape[1] <= skip:
            return super().mean(tokens, skip)
        return _Mean.apply(self.record, tokens, skip) if _graph(tokens) else _mean(self.record, tokens, skip)

    def _movable(self, *tensors: Tensor | None) -> bool:
        """Whether a kernel may be given these: ordinary tensors of one dtype that the backend has, not empty."""
        given = [t for t in tensors if t is not None]
        return (
            ordinary(given)
            and transform() is None
            and given[0].dtype in self.record.dtypes
            and given[0].device.type in self.record.device_types
            and all(t.dtype == given[0].dtype and t.numel() for t in given)
        )


def of(backend: str) -> Movement:
    """The movement that goes with the ops of a backend."""
    record = backends.get(backend) if backend != "auto" else None
    return KernelMovement(record) if isinstance(record, NativeBackend) and record.moves else TORCH


TORCH = Movement()


def _addressable(*grads: Tensor) -> bool:
    """Whether `move` may read these gradients: else PyTorch's own backward stands in."""
    return ordinary(grads) and not any(map(batched, grads))


def _graph(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _put_together(record: NativeBackend, patches: Tensor, prefix: Tensor | None, position: Tensor | None) -> Tensor:
    """[prefix; patches] + position."""
    batch, count, columns = patches.shape
    leads = 0 if prefix is None else prefix.shape[1]
    shape = (batch, leads + count, columns)
    lead = None if prefix is None else prefix.expand(batch, -1, -1)
    more = None if position is None else position.expand(shape)
    return move(record, shape, patches, lead, more, leads=leads)


def _mean(record: NativeBackend, tokens: Tensor, skip: int) -> Tensor:
    """[B, N, C] -> [B, C]."""
    batch, count, columns = tokens.shape
    terms = count - skip
    return move(record, (batch, columns), tokens[:, skip], terms=terms, term=tokens.stride(1), divisor=terms)


def _joined(record: NativeBackend, images: Sequence[Tensor]) -> Tensor:
    """[1, n, C] of each image -> [1, sum of n, C]."""
    lengths, columns = [x.shape[1] for x in images], images[0].shape[2]
    out = record.empty((1, sum(lengths), columns), images[0].dtype, images[0].device)
    for x, part in zip(images, out.split(lengths, dim=1), strict=True):
        move_into(record, part, x)
    return out


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: NativeBackend, *images: Tensor) -> Tensor:
        ctx.lengths = [x.shape[1] for x in images]
        return _joined(record, images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, *dy.split(ctx.lengths, dim=1)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: NativeBackend, tokens: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
        ctx.record = record
        return tokens.split(lengths, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, _joined(ctx.record, grads) if _addressable(*grads) else TORCH.join(grads), None


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: NativeBackend, view: Tensor) -> Tensor:
        return move(record, view.shape, view)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, dy


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: NativeBackend, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.record = record
        return x.view_as(x), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Any:
        return None, _sum(ctx.record, first, second)


def _sum(record: NativeBackend, first: Tensor, second: Tensor) -> Tensor:
    if first.dim() > 6 or not _addressable(first, second):
        return first + second
    return move(record, first.shape, first, b=second)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: NativeBackend, packed: Tensor) -> tuple[Tensor, ...]:
        ctx.record, ctx.shape = record, packed.shape
        return packed.unbind(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if not _addressable(*grads):
            return None, torch.stack(grads, 2)
        record, (batch, count, _, heads, width) = ctx.record, ctx.shape
        q, k, v = (contiguous(record, g).view(batch * count, 1, heads * width) for g in grads)
        both = move(record, (batch * count, 2, heads * width), k, q, leads=1)
        return None, move(record, (batch * count, 3, heads * width), v, both, leads=2).view(ctx.shape)


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, record: NativeBackend, patches: Tensor, prefix: Tensor | None, position: Tensor | None
    ) -> Tensor:
        ctx.record, ctx.leads = record, 0 if prefix is None else prefix.shape[1]
        return _put_together(record, patches, prefix, position)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        record = ctx.record
        _, patches, prefix, position = ctx.needs_input_grad
        rest = dy[:, ctx.leads :]
        if not _addressable(dy):
            summed = dy.sum(0, keepdim=True)
            lead = summed[:, : ctx.leads]
            return None, rest if patches else None, lead if prefix else None, summed if position else None
        batch, distance = dy.shape[0], dy.stride(0)
        lead = dy[:1, : ctx.leads]  # of the first image: sums over the batch begin there
        total = move(record, dy[:1].shape, dy[:1], terms=batch, term=distance) if position else None
        dprefix = move(record, lead.shape, lead, terms=batch, term=distance) if prefix else None
        return None, contiguous(record, rest) if patches else None, dprefix, total


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: NativeBackend, tokens: Tensor, count: int) -> Tensor:
        ctx.record, ctx.shape, ctx.count = record, tokens.shape, count
        first = tokens[:, :count]
        return move(record, first.shape, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        if not _addressable(dy):
            return None, F.pad(dy, (0, 0, 0, ctx.shape[1] - ctx.count)), None
        return None, move(ctx.record, ctx.shape, None, dy, leads=ctx.count), None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: NativeBackend, tokens: Tensor, skip: int) -> Tensor:
        ctx.record, ctx.shape, ctx.skip = record, tokens.shape, skip
        return _mean(record, tokens, skip)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        batch, count, columns = ctx.shape
        terms = count - ctx.skip
        each = dy[:, None].expand(batch, terms, columns)
        if not _addressable(dy):
            return None, F.pad(each / terms, (0, 0, ctx.skip, 0)), None
        return None, move(ctx.record, ctx.shape, each, leads=ctx.skip, divisor=terms), None
