"""Ops without a backward: `VIT_ROUTINE`s of the native contract that are called as ops are."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import NativeBackend, Spec, expect
from . import bound, registration
from .bound import AutoOp, NativeOp, ReferenceOp


@dataclass(frozen=True, eq=False, kw_only=True)
class Routine:
    """What Python knows of a routine: as of an `Op`, in one direction."""

    name: str
    reference: Callable[..., Tensor]
    limits: Callable[[Spec], list[str]]
    arguments: Callable[..., tuple[tuple[Any, ...], None]]
    schema: str
    fake: Callable[..., Tensor]
    launcher: Callable[..., Tensor]
    fields: str
    #: What to do where a gradient is wanted, after "Use torch.no_grad(), or".
    differentiable: str
    #: Its tensors keep their dtypes under autocast.
    autocasts = False

    #: Names of the kernel's arguments; the tensors among them -> what is allowed for each.
    inputs: tuple[str, ...] = field(init=False)
    tensors: dict[str, tuple[type, ...]] = field(init=False)

    def __post_init__(self) -> None:
        arguments = self.schema.split("->")[0]
        object.__setattr__(self, "inputs", tuple(re.findall(r"(\w+)(?:,|\))", arguments)))
        kinds = {"": (Tensor,), "?": (Tensor, type(None))}
        object.__setattr__(self, "tensors", {n: kinds[k] for k, n in re.findall(r"Tensor(\??) (\w+)", arguments)})
        expect(self.name, self.fields)


class ReferenceRoutine(ReferenceOp):
    """The PyTorch formula, as forward only as the kernels: that of rounded numbers has a gradient of no use."""

    op: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        refuse_gradient(self, (*args, *kwargs.values()))
        return self.op.reference(*args, **kwargs)


class NativeRoutine(NativeOp):
    """A compiled routine."""

    op: Any

    def __init__(self, op: Any, backend: str) -> None:
        bound.BoundOp.__init__(self, op, backend)
        record = backends.get(backend)
        assert isinstance(record, NativeBackend)  # for the type checker: bind_all() looks before it calls
        self.record = record
        self.registered = registration.register_one(record, op.name, op.schema, op.launcher, op.fake)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if bound.runs_elsewhere():
            return self.op.reference(*args, **kwargs)
        inputs, _ = self.op.arguments(*args, **kwargs)
        if not self.takes(inputs):
            return self.op.reference(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self.registered(*inputs)
        refuse_gradient(self, inputs)
        if self.transformed(inputs):
            return self.op.reference(*args, **kwargs)
        if bound.ordinary(inputs):
            return self.op.launcher(self.record, *inputs)
        return bound.dispatched(self.registered, *inputs)


def refuse_gradient(routine: ReferenceRoutine | NativeRoutine, inputs: tuple[Any, ...]) -> None:
    """BackendError where autograd would want a backward."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in inputs):
        raise backends.BackendError(
            f"vit: '{routine.op.name}' on backend '{routine.backend}' has no backward, and one of its tensors requires "
            f"a gradient. Use torch.no_grad(), or {routine.op.differentiable}."
        )


def bind_all(routine: Routine) -> None:
    """Makes the callables of a routine for every backend."""
    op: Any = routine
    bound.put(AutoOp(op, "auto"))
    for record in backends.records().values():
        kind = NativeRoutine if isinstance(record, NativeBackend) else ReferenceRoutine
        bound.put(kind(op, record.name))
