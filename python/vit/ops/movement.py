"""What a model does between its ops: patches cut, tokens put together, gradients added where a tensor has two users.

Plain PyTorch, except on a backend whose threads are not PyTorch's: there a kernel of the backend does it, since each
parallel op of PyTorch leaves OpenMP workers behind that spin on the cores the next kernel needs. Not an op of OPS:
nothing is computed here that another backend would have to match, and no plan can refuse it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import backends
from ..backends import NativeBackend
from .op import _ordinary


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

    def tokens(self, patches: Tensor, prefix: Tensor | None, position: Tensor | None) -> Tensor:
        """[prefix; patches] + position: patches [B, n, C], prefix [1, k, C] or None, position [1, k + n, C] or None."""
        if prefix is not None:
            patches = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], dim=1)
        return patches if position is None else patches + position

    def first(self, tokens: Tensor, count: int) -> Tensor:
        """The first `count` tokens of each sample: [B, N, C] -> [B, count, C]."""
        return tokens[:, :count]


class KernelMovement(Movement):
    """The functions on a backend that has `move`; in plain PyTorch where something traces or looks on."""

    def __init__(self, record: NativeBackend) -> None:
        self.record, self.backend = record, record.name

    def contiguous(self, view: Tensor) -> Tensor:
        if not self._movable(view) or view.is_contiguous() or view.dim() > 6 or view.stride(-1) != 1:
            return super().contiguous(view)
        return _Contiguous.apply(self.record, view)

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not (torch.is_grad_enabled() and x.requires_grad and self._movable(x)):
            return super().fork(x)
        return _Fork.apply(self.record, x)

    def tokens(self, patches: Tensor, prefix: Tensor | None, position: Tensor | None) -> Tensor:
        if not self._movable(patches, prefix, position) or (prefix is None and position is None):
            return super().tokens(patches, prefix, position)
        return _Tokens.apply(self.record, patches, prefix, position)

    def first(self, tokens: Tensor, count: int) -> Tensor:
        if not self._movable(tokens) or tokens.shape[1] <= count:
            return super().first(tokens, count)
        return _First.apply(self.record, tokens, count)

    def _movable(self, *tensors: Tensor | None) -> bool:
        """Whether a kernel may be given these: ordinary tensors of one dtype that the backend has, not empty."""
        given = [t for t in tensors if t is not None]
        return (
            _ordinary(given)
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            and given[0].dtype in self.record.dtypes
            and given[0].device.type in self.record.device_types
            and all(t.dtype == given[0].dtype and t.numel() for t in given)
        )


def of(backend: str) -> Movement:
    """The movement that goes with the ops of a backend."""
    record = backends.get(backend) if backend != "auto" else None
    return KernelMovement(record) if isinstance(record, NativeBackend) and record.moves else TORCH


TORCH = Movement()


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: NativeBackend, view: Tensor) -> Tensor:
        return record.move(view.shape, view)

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
        return None, ctx.record.move(first.shape, first.contiguous(), b=second.contiguous())


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, record: NativeBackend, patches: Tensor, prefix: Tensor | None, position: Tensor | None
    ) -> Tensor:
        batch, count, columns = patches.shape
        ctx.record, ctx.leads = record, 0 if prefix is None else prefix.shape[1]
        shape = torch.Size((batch, ctx.leads + count, columns))
        lead = None if prefix is None else prefix.contiguous().expand(batch, -1, -1)
        more = None if position is None else position.contiguous().expand(shape)
        return record.move(shape, patches.contiguous(), lead, more)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        dy = dy.contiguous()
        batch, count, columns = dy.shape
        _, patches, prefix, position = ctx.needs_input_grad
        # Sums over the batch.
        total = ctx.record.move((1, count, columns), dy[:1], terms=batch, term=count * columns) if position else None
        dprefix = None
        if prefix:
            lead = dy[:1, : ctx.leads]
            dprefix = ctx.record.move(lead.shape, lead, terms=batch, term=count * columns)
        dpatches = dy[:, ctx.leads :]
        return None, ctx.record.move(dpatches.shape, dpatches) if patches else None, dprefix, total


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: NativeBackend, tokens: Tensor, count: int) -> Tensor:
        ctx.record, ctx.shape = record, tokens.shape
        first = tokens[:, :count]
        return record.move(first.shape, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, ctx.record.move(ctx.shape, None, dy.contiguous()), None
