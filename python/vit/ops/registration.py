"""The kernels of an op as ops of torch's dispatcher: for torch.compile, fake tensors and profilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import NativeBackend
from . import flops
from .op import Op


def register(op: Op, record: NativeBackend) -> tuple[Any, Any]:
    """Defines vit_<backend>::<op>_fwd and _bwd, and returns them."""
    namespace = f"vit_{record.name}"
    library = torch.library.Library(namespace, "FRAGMENT")
    _LIBRARIES.append(library)
    for direction, schema, launch, fake in (
        ("fwd", op.fwd_schema, op.launch_fwd, op.fwd_fake),
        ("bwd", op.bwd_schema, op.launch_bwd, op.bwd_fake),
    ):
        _define(library, namespace, f"{op.name}_{direction}", schema, _as_torch_wants(launch, record), fake)
    ops = getattr(torch.ops, namespace)
    fwd_op, bwd_op = getattr(ops, f"{op.name}_fwd").default, getattr(ops, f"{op.name}_bwd").default
    torch.library.register_vmap(bwd_op, _each(bwd_op), lib=library)  # PyTorch's own fallback warns that it is slow
    return fwd_op, bwd_op


def _each(op: Any) -> Callable[..., Any]:
    """The rule of torch.vmap: a call for each of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        # A list of switches has a list of dimensions, none of them one.
        stacks = [a.movedim(d, 0) if isinstance(d, int) else None for a, d in zip(args, in_dims, strict=True)]
        calls = [
            op(*(a if stack is None else stack[i] for a, stack in zip(args, stacks, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        outputs = tuple(map(torch.stack, zip(*calls, strict=True)))
        return outputs, (0,) * len(outputs)

    return rule


def register_one(
    record: NativeBackend, name: str, schema: str, launch: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """Defines vit_<backend>::<name>, a routine, and returns it."""
    namespace = f"vit_{record.name}"
    library = torch.library.Library(namespace, "FRAGMENT")
    _LIBRARIES.append(library)
    _define(library, namespace, name, schema, _as_torch_wants(launch, record), fake)
    return getattr(getattr(torch.ops, namespace), name).default


def _define(library: Any, namespace: str, name: str, schema: str, kernel: Any, fake: Any) -> None:
    library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    flops.know(namespace, name)


def register_gradients(op: Op, fwd_op: Any, bwd: Callable[..., Any], guard: Callable[..., Any]) -> None:
    """The registered forward op differentiates by itself wherever no autograd.Function of ours stands around it: in
    compiled graphs. `bwd` is the backward kernel, `guard` refuses a second backward."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *args, saved = inputs
        # A graph that was made without gradients may be asked for them: the forward is then run once more.
        outputs = output if saved else fwd_op(*args, True)
        op.save(ctx, tuple(args), outputs if isinstance(outputs, tuple) else (outputs,))

    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *guard(ctx, dy, op.backward(ctx, bwd, dy)), None

    torch.library.register_autograd(fwd_op, backward, setup_context=keep, lib=_LIBRARIES[-1])


_LIBRARIES: list[torch.library.Library] = []  # a Library undefines its ops when it is collected


def _as_torch_wants(launch: Callable[..., Any], record: NativeBackend) -> Callable[..., Any]:
    """A launcher as an op of torch: what was not computed (None) is an empty tensor, as the fakes say."""

    def kernel(*args: Any) -> Any:
        outputs = launch(record, *args)
        if not isinstance(outputs, tuple):
            return outputs
        return tuple(args[0].new_empty(0) if y is None else y for y in outputs)

    return kernel
