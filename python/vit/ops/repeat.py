"""Small calls on the CPU that were made before: the compiled module repeats them without their launcher.

What `arguments` and a launcher compute in Python follows from the dtypes, shapes and strides of the tensors and from
the other arguments. The launcher runs for the first call of a kind, and the compiled module keeps the arguments of the
kernel; for the next one it replaces pointers, threads and scratch memory and makes the result as `torch.empty` does
(csrc/repeat.h). The launcher runs every time where a call may be another: with gradients, transforms, modes, autocast
or subclasses, where it copied or called more than one kernel, and for results as large as those of
`vit.backends._host_memory`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import NativeBackend

#: (arguments, scratch memory) -> the result; None where no such call is kept yet, False where the launcher has to run.
Again = Callable[[tuple[Any, ...], tuple[int, int]], Any]
#: (arguments, result, like) -> None: keeps the call of a kernel made since `listen`.
Learn = Callable[[tuple[Any, ...], Tensor, Tensor | None], None]


def repeats(record: NativeBackend) -> tuple[Again, Learn]:
    """The two functions for an op, with no call kept yet."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # of PyTorch 2.10 and newer
    made = None
    if exchange is not None and record.repeats_below and record.unavailable() is None:
        made = record.lib.repeats(
            exchange, Tensor, torch.nn.Parameter, watchers(), torch.is_grad_enabled, torch.get_num_threads,
            torch.empty_like,
        )  # fmt: skip
    return made or (_never, _nothing)


def watchers() -> tuple[Callable[[], Any], ...]:
    """Functions that say whether a mode, a transform, a trace or autocast is active, which have to see every call."""
    return (
        torch._C._len_torch_dispatch_stack,
        torch._C._are_functorch_transforms_active,
        torch._C._get_tracing_state,
        torch._C._is_any_autocast_enabled,
    )


def like(record: NativeBackend, y: Tensor) -> Tensor | None:
    """What torch.empty_like makes the results of repeated calls of, one element of memory; None for a large result."""
    if y.nbytes >= record.repeats_below or not y.is_contiguous():
        return None
    one = y.new_empty(()).expand(y.shape)
    return one if torch.empty_like(one).is_contiguous() else None


def repeated(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an object with `record` and `repeats` that makes at most one call of a kernel."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: Any, *args: Any) -> Any:
        if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
            return method(self, *args)
        again, learn = self.repeats
        kind = (name, *args)
        y = again(kind, NO_SCRATCH)
        if type(y) is Tensor or y is False:
            return method(self, *args) if y is False else y
        self.record.lib.listen()
        y = method(self, *args)
        learn(kind, y, like(self.record, y))
        return y

    return call


NO_SCRATCH = (0, 0)


def _never(arguments: tuple[Any, ...], scratch: tuple[int, int]) -> bool:
    return False


def _nothing(arguments: tuple[Any, ...], result: Tensor, like: Tensor | None) -> None:
    pass
