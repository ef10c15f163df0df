"""What a case is: one call of one op, with the tensors it is made with."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]

#: What is tested: the public ops without `backend`, e.g. `plan.ops` or `backend_ops(name)`.
Ops = Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one op: sizes, dtypes, options, memory layout and kind of values; `id` names it."""

    op: str
    group: str
    sizes: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, Any], ...] = ()
    layout: str = ""  # how tensors lie in memory, see `problems.lay_out`; empty: contiguous
    values: str = ""  # "<kind>_<input>" joined by "+", see `problems.fill`; empty: normally distributed
    dtype: str = "float32"
    param_dtype: str = ""  # weights and biases; empty: dtype
    out_dtype: str = ""  # residual and output of linear; empty: dtype
    direction: str = "fwd"  # "fwd" runs without autograd, "bwd" checks the output and every gradient
    tf32: bool = False  # float32 products may round their inputs to TF32

    def __getitem__(self, letter: str) -> int:
        return dict(self.sizes)[letter]

    def option(self, name: str, default: Any = None) -> Any:
        return dict(self.options).get(name, default)

    @property
    def precision(self) -> str:
        """The dtype, or "float32-tf32"."""
        return f"{self.dtype}-tf32" if self.tf32 else self.dtype

    @property
    def id(self) -> str:
        """Printable and unique, e.g. "linear-bwd-bfloat16-m197n768k768-gelu-residual"."""
        dtype = self.precision
        if self.param_dtype:
            dtype += f"-param_{self.param_dtype}"
        if self.out_dtype:
            dtype += f"-out_{self.out_dtype}"
        sizes = "".join(f"{letter}{size}" for letter, size in self.sizes)
        options = [_option_text(name, value) for name, value in self.options]
        return "-".join(filter(None, [self.op, self.direction, dtype, sizes, *options, self.layout, self.values]))


def _option_text(name: str, value: Any) -> str:
    if value is True:
        return name
    if value is False:
        return f"no_{name}"
    if isinstance(value, tuple):
        return name + "_".join(map(str, value))
    return value if isinstance(value, str) else f"{name}{value:g}"


def words(text: str) -> list[str]:
    """ "m1 c1, m3 c2" -> ["m1 c1", "m3 c2"]."""
    return text.split(", ")


def case_of(op: str, group: str, sizes: str, *, layout: str = "", values: str = "", **options: Any) -> Case:
    """A case from its sizes as text, e.g. "m197 n768 k768"."""
    pairs = tuple((word[0], int(word[1:])) for word in sizes.split())
    return Case(op, group, pairs, tuple(options.items()), layout, values)
