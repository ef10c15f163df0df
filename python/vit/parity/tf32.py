"""TF32 in plain PyTorch: what a product on tensor cores does to float32 factors, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: The distance from 1 to the next TF32 number.
EPS = 2.0**-10

_ATEN = torch.ops.aten
#: The products of ATen, and which of their arguments is the first factor; the second one follows it.
_PRODUCTS = {
    _ATEN.mm.default: 0,
    _ATEN.bmm.default: 0,
    _ATEN.mv.default: 0,
    _ATEN.dot.default: 0,
    _ATEN.addmm.default: 1,
    _ATEN.addmv.default: 1,
    _ATEN.baddbmm.default: 1,
}


def round_factor(x: Tensor) -> Tensor:
    """A float32 tensor rounded to the 10 fraction bits of TF32, halves away from zero."""
    rounded = ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


class RoundedProducts(TorchDispatchMode):
    """While active, the factors of every product of float32 are rounded to TF32, in the backward as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (first := _PRODUCTS.get(func)) is not None and args[first].dtype == torch.float32:
            factors = map(round_factor, args[first : first + 2])
            args = (*args[:first], *factors, *args[first + 2 :])
        return func(*args, **(kwargs or {}))
