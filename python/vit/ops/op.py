"""What Python knows of one op: the record each ops/_<name>.py fills."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..backends import Spec, expect

#: What a kernel returns: one tensor, or a tuple with None for each output that is not wanted.
Outputs = Tensor | tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Op:
    """Everything Python knows of one op; each function is written in ops/_<name>.py, in this order.

    reference   the formula in plain PyTorch, with the public arguments; the oracle of all kernels
    limits      Spec -> reasons why no native kernel can run it
    arguments   public arguments -> the arguments of the forward kernel (casts, shapes), and what to do with its result
    fwd_schema, fwd_fake   schema and shape function of the forward kernel; its last argument `save` says whether the
                backward will follow, and its first output is the result
    launch_fwd  (backend, *arguments, save): allocates the outputs and runs the kernel. What is not computed is None
                here, `first argument.new_empty(0)` in a fake (a schema has no optional outputs)
    fwd_fields  names of the fields of the kernel's params struct, as launch_fwd gives them
    bwd_schema, bwd_fake, launch_bwd, bwd_fields   the same of the backward kernel
    save        (ctx, args, outputs): keep what backward needs
    backward    (ctx, kernel, dy): gradients for each argument of the forward kernel, None where not wanted
    autocasts   whether `arguments` casts to the dtype of torch.autocast
    """

    name: str
    reference: Callable[..., Tensor]
    limits: Callable[[Spec], list[str]]
    arguments: Callable[..., tuple[tuple[Any, ...], Callable[[Tensor], Tensor] | None]]
    fwd_schema: str
    fwd_fake: Callable[..., Outputs]
    launch_fwd: Callable[..., Outputs]
    fwd_fields: str
    bwd_schema: str
    bwd_fake: Callable[..., Outputs]
    launch_bwd: Callable[..., Outputs]
    bwd_fields: str
    save: Callable[..., None]
    backward: Callable[..., tuple[Tensor | None, ...]]
    autocasts: bool = False

    #: Names of the forward kernel's arguments, the tensors among them first.
    inputs: tuple[str, ...] = field(init=False)
    #: The tensors among them -> what is allowed for each: a tensor, or None too.
    tensors: dict[str, tuple[type, ...]] = field(init=False)

    def __post_init__(self) -> None:
        arguments = self.fwd_schema.split("->")[0]
        object.__setattr__(self, "inputs", tuple(re.findall(r"(\w+)(?:,|\))", arguments)))
        kinds = {"": (Tensor,), "?": (Tensor, type(None))}
        object.__setattr__(self, "tensors", {n: kinds[k] for k, n in re.findall(r"Tensor(\??) (\w+)", arguments)})
        # A module whose structs have other fields, or the same in another order, would read one for the other.
        expect(f"{self.name}_fwd", self.fwd_fields)
        expect(f"{self.name}_bwd", self.bwd_fields)
