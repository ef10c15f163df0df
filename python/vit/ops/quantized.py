"""What `linear_int8` and `linear_fp8` share: a linear layer whose inputs and weights are numbers of 8 bits.

They differ in those numbers alone (`Format`) and in how their products are added up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import NativeBackend, Spec
from . import _gelu
from ._linear import _APPROXIMATE, _activation_name, _out_dtype
from .launch import contiguous, launch, ptr, row_count, rows
from .routine import Routine

#: The most products of two such numbers whose sum always fits 32 bits (int8), or float64 without rounding (fp8: below
#: 2^35 in steps of 2^-18).
MOST_INPUTS = 131072

#: Rows whose largest |element| is below it have the scale 1.
LEAST = 2.0**-100


@dataclass(frozen=True)
class Format:
    """Numbers of 8 bits, and how rows of others become them."""

    name: str
    words: str
    dtype: torch.dtype
    #: What the largest |element| of a row becomes, the largest number there is but int8's -128.
    largest: float
    #: float32 within +-largest -> the nearest number, halves to even.
    nearest: Callable[[Tensor], Tensor]
    #: What sums of at most MOST_INPUTS products do.
    sums: str

    @property
    def routine(self) -> str:
        """The name of its linear layer."""
        return f"linear_{self.name}"

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., K] in this format and the scale of each row [..., 1] float32: max |x| / largest, 1 for rows below
        2^-100, NaN (and zeros in their place) for rows with a NaN or an infinity."""
        x = x.float()
        largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
        scale = torch.where(largest < LEAST, torch.ones_like(largest), largest / self.largest)
        scale = torch.where(largest.isfinite(), scale, torch.full_like(scale, torch.nan))
        # The largest one, divided by its scale, may be one rounding above the limit.
        return self.nearest((x / scale).nan_to_num(0.0).clamp(-self.largest, self.largest)), scale


def _nearest_integer(x: Tensor) -> Tensor:
    return x.round().to(torch.int8)


def _nearest_e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn)


INT8 = Format("int8", "8-bit integers", torch.int8, 127.0, _nearest_integer, "fit 32 bits")
FP8 = Format("fp8", "8-bit floats", torch.float8_e4m3fn, 448.0, _nearest_e4m3, "are exact in float64")

#: By the names that `vit.quantize` takes.
FORMATS = {f.name: f for f in (INT8, FP8)}

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? scale, Tensor? residual, str activation,"
    " ScalarType out_dtype) -> Tensor"
)
FIELDS = (
    "x weight weight_scale bias scale residual y M N K x_stride weight_stride activation dtype out_dtype"
    " workspace context"
)


def routine_of(form: Format) -> Routine:
    """The record of a format's linear layer."""
    checked = functools.partial(arguments, form)

    def reference(*args: Any, **kwargs: Any) -> Tensor:
        """The formula in PyTorch."""
        given, _ = checked(*args, **kwargs)
        return formula(form, *given)

    return Routine(
        name=form.routine,
        reference=reference,
        limits=functools.partial(limits, form),
        arguments=checked,
        schema=SCHEMA,
        fake=fake,
        launcher=functools.partial(launcher, form),
        fields=FIELDS,
        differentiable="train the model before it is quantized",
    )


def arguments(
    form: Format,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[tuple[Any, ...], None]:
    """The arguments of the kernel, in dtypes that go together."""
    name = _activation_name(activation)
    check(form, x, weight, residual, {"weight_scale": weight_scale, "bias": bias, "scale": scale})
    out = _out_dtype(x.dtype, residual=residual, scale=scale)
    residual = None if residual is None else residual.to(out)
    bias = None if bias is None else bias.float()
    scale = None if scale is None else scale.float()
    return (x, weight, weight_scale.float(), bias, scale, residual, name, out), None


def limits(form: Format, spec: Spec) -> list[str]:
    """What no native kernel can run."""
    reasons = ["it has no backward"] if spec.training else []
    if spec.dtype == torch.float64:
        reasons.append(f"dtype float64 is more than {form.words} can hold; allowed are float32, bfloat16, float16")
    return reasons


def formula(
    form: Format,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [..., N] of the kernel's arguments."""
    q, x_scale = form.quantize_rows(x)
    sums = q.double() @ weight.double().T  # exact: MOST_INPUTS
    y = sums.float() * (x_scale * weight_scale)
    if bias is not None:
        y = y + bias
    if activation != "none":
        y = _gelu.reference(y, _APPROXIMATE[activation])
    if scale is not None:
        y = y * scale
    return (y if residual is None else y + residual).to(out_dtype)


def launcher(
    form: Format,
    backend: NativeBackend,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """The same of a compiled backend."""
    shape, device, codes = x.shape, x.device, backend.codes
    n, k = weight.shape
    x, x_stride = rows(backend, x)
    weight, weight_scale = weight.contiguous(), contiguous(backend, weight_scale)
    bias, scale, residual = (None if t is None else contiguous(backend, t) for t in (bias, scale, residual))
    y = backend.empty((*shape[:-1], n), out_dtype, device)
    fields = (
        ptr(x), ptr(weight), ptr(weight_scale), ptr(bias), ptr(scale), ptr(residual), ptr(y),
        row_count(shape), n, k, x_stride, k, backend.activations[activation], codes[x.dtype], codes[out_dtype],
    )  # fmt: skip
    launch(backend, getattr(backend.lib, form.routine), fields, device)
    return y


def check(
    form: Format, x: Tensor, weight: Tensor, residual: Tensor | None, of_outputs: dict[str, Tensor | None]
) -> None:
    """ValueError for sizes and dtypes that do not fit; of_outputs: what must have the shape [N]."""
    op = f"vit.ops.{form.routine}"
    if not x.shape or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        shapes = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"{op}: x [..., K] and weight [N, K] differ in K: {shapes}")
    n, k = weight.shape
    if k > MOST_INPUTS:
        raise ValueError(f"{op}: K is {k}; sums of at most {MOST_INPUTS} products of {form.words} {form.sums}")
    if weight.dtype != form.dtype:
        wanted = str(form.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: weight must be {wanted}, got {weight.dtype}; vit.quantize makes such layers")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{op}: x must be float32, bfloat16 or float16, got {x.dtype}")
    for what, given in of_outputs.items():
        if given is not None and given.shape != (n,):
            raise ValueError(f"{op}: {what} must have shape [{n}], got {list(given.shape)}")
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(
            f"{op}: residual must have the shape of the result {[*x.shape[:-1], n]}, got {list(residual.shape)}"
        )


def fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [..., N]."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)
