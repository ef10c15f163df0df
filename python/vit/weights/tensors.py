"""What a tensor must be before it may become a parameter: dense values of its own, floating point, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..support.text import printable
from .checkpoint import WeightsError, all_finite, some


def plain(name: str, value: Any, source: str) -> Tensor:
    """The value as an ordinary CPU tensor.

    Raises WeightsError for one that has no values (meta), is not dense (sparse, nested, quantized, distributed), is no
    floating point (integers, booleans, complex numbers: codes of a quantization, or another thing altogether), or is
    a view that repeats its elements: 14 KB of a file can say 4 TB in that way.
    """
    if isinstance(value, np.ndarray):
        value = from_numpy(name, value, source)
    why = _fault(value)
    if why is None:
        try:
            return value.detach().as_subclass(Tensor).cpu().resolve_neg()
        except (RuntimeError, NotImplementedError) as error:
            why = f"cannot be brought to the CPU: {_first_line(error)}"
    raise WeightsError(
        f"vit: {source}: {printable(name)} {why}; parameters are dense floating-point tensors with values of their own"
    )


def _fault(value: Tensor) -> str | None:
    """Why a tensor is not plain; None when it is. Looks at what the tensor says of itself and touches no element."""
    own_rules = type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if own_rules and type(value) not in (Tensor, nn.Parameter):
        return f"is a {type(value).__name__}, not an ordinary tensor; give full or dequantized tensors"
    if value.is_nested:
        return "is a nested tensor"
    if value.layout != torch.strided:
        return f"is stored as {_word(value.layout)}; use .to_dense()"
    if value.is_quantized:
        return f"is quantized ({_word(value.dtype)}); use .dequantize()"
    if value.is_meta:
        return "is on the meta device, without values"
    if not value.is_floating_point() or value.dtype.itemsize < 1 or "float4" in str(value.dtype):
        return f"is {_word(value.dtype)}, not floating point"
    needed, there = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if needed > there:
        return f"is a view that repeats its elements ({needed} bytes from {there}); use .contiguous()"
    return None


def from_numpy(name: str, array: np.ndarray, source: str) -> Tensor:
    """An array of any byte order as a tensor; two bytes without a type are bfloat16, as ml_dtypes saves it."""
    if array.dtype.name == "bfloat16" or (array.dtype.str == "|V2" and array.dtype.names is None):
        return torch.from_numpy(np.require(array.view(np.uint16), requirements=("C", "W"))).view(torch.bfloat16)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise WeightsError(
            f"vit: {source}: {printable(name)} is {array.dtype.str!r} ({array.dtype.name}); weights are float16, "
            "float32, float64 or bfloat16 (two bytes without a type)"
        )
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ("C", "W")))


def check_range(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """Refuses finite values that would become infinite in the model's dtype."""
    bad = [
        key
        for key, own in wanted.items()
        if (value := state.get(key)) is not None
        and torch.finfo(value.dtype).max > torch.finfo(own.dtype).max
        and all_finite(value)
        and not all_finite(value, own.dtype)
    ]
    if bad:
        dtype = _word(wanted[bad[0]].dtype)
        raise WeightsError(
            f"vit: {source}: values of {some(bad)} are too large for {dtype} and would become infinite; create the "
            "model with a dtype of larger range (float32, bfloat16, float64)"
        )


def _word(value: object) -> str:
    return str(value).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
