"""The affine map of a fully connected layer on 8-bit integers, with what follows it fused in: a forward alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import NativeBackend, Spec
from . import _gelu
from ._linear import _APPROXIMATE, _activation_name, _out_dtype
from .bound import call
from .launch import contiguous, launch, ptr, row_count, rows
from .routine import Routine

#: The most products of two bytes whose sum always fits 32 bits.
MOST_INPUTS = 131072

#: Rows whose largest |element| is below it have the scale 1.
LEAST = 2.0**-100


def linear_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiplies by a weight matrix of 8-bit integers, adds the bias, applies activation and scale, adds the residual.

    x_scale = max |x| of the row / 127, q = x / x_scale rounded half to even,
    y = scale * activation((sum of q weight) * (x_scale * weight_scale) + bias) + residual

    in float32: division, rounding and the sums in 32-bit integers are exact, so that q and the sums are equal on every
    backend, and y too where there are only they and the scales. A row whose largest |x| is below 2^-100 has the scale
    1; one that holds a NaN or an infinity gives NaN. activation: as of vit.ops.linear.

    x [..., K] float32, bfloat16 or float16, K at most 131072; weight [N, K] int8, from -127 to 127; weight_scale and
    bias [N] float32; residual [..., N] (the shape of y) or None; scale [N] or None; y [..., N] in x's dtype, or in the
    widest of x's, the residual's and the scale's. For inference: there is no backward.
    Raises ValueError for sizes or dtypes that do not fit, BackendError when the named backend cannot run it or a
    gradient is wanted.
    """
    given = {"x": x, "weight": weight, "weight_scale": weight_scale, "bias": bias, "activation": activation}
    return call(OP, backend, **given, residual=residual, scale=scale)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] as int8 and the scale of each row [..., 1] float32: the definition in `linear_int8`'s docstring."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    scale = torch.where(largest < LEAST, torch.ones_like(largest), largest / 127)
    scale = torch.where(largest.isfinite(), scale, torch.full_like(scale, torch.nan))
    return (x / scale).round().nan_to_num(0.0).to(torch.int8), scale


def reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The formula in PyTorch."""
    inputs, _ = arguments(x, weight, weight_scale, bias, activation, residual, scale)
    x, weight, weight_scale, bias, scale, residual, name, out = inputs
    q, x_scale = quantize_rows(x)
    sums = q.double() @ weight.double().T  # exact: below 2^31
    y = sums.float() * (x_scale * weight_scale)
    if bias is not None:
        y = y + bias
    if name != "none":
        y = _gelu.reference(y, _APPROXIMATE[name])
    if scale is not None:
        y = y * scale
    return (y if residual is None else y + residual).to(out)


def limits(spec: Spec) -> list[str]:
    """What no native kernel can run."""
    reasons = ["it has no backward"] if spec.training else []
    if spec.dtype == torch.float64:
        reasons.append("dtype float64 is more than 8-bit integers can hold; allowed are float32, bfloat16, float16")
    return reasons


# ----- native


def arguments(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[tuple[Any, ...], None]:
    """The arguments of the kernel, in dtypes that go together."""
    name, op = _activation_name(activation), "vit.ops.linear_int8"
    if not x.shape or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        shapes = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"{op}: x [..., K] and weight [N, K] differ in K: {shapes}")
    n, k = weight.shape
    if k > MOST_INPUTS:
        raise ValueError(f"{op}: K is {k}; sums of at most {MOST_INPUTS} products of bytes fit 32 bits")
    if weight.dtype != torch.int8:
        raise ValueError(f"{op}: weight must be int8, got {weight.dtype}; vit.quantize makes such layers")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{op}: x must be float32, bfloat16 or float16, got {x.dtype}")
    for what, given in {"weight_scale": weight_scale, "bias": bias, "scale": scale}.items():
        if given is not None and given.shape != (n,):
            raise ValueError(f"{op}: {what} must have shape [{n}], got {list(given.shape)}")
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(
            f"{op}: residual must have the shape of the result {[*x.shape[:-1], n]}, got {list(residual.shape)}"
        )
    out = _out_dtype(x.dtype, residual=residual, scale=scale)
    residual = None if residual is None else residual.to(out)
    bias = None if bias is None else bias.float()
    scale = None if scale is None else scale.float()
    return (x, weight, weight_scale.float(), bias, scale, residual, name, out), None


SCHEMA = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? scale, Tensor? residual, str activation,"
    " ScalarType out_dtype) -> Tensor"
)
FIELDS = (
    "x weight weight_scale bias scale residual y M N K x_stride weight_stride activation dtype out_dtype"
    " workspace context"
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


def launcher(
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
    """y [..., N]."""
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
    launch(backend, backend.lib.linear_int8, fields, device)
    return y


OP = Routine(
    name="linear_int8",
    reference=reference,
    limits=limits,
    arguments=arguments,
    schema=SCHEMA,
    fake=fake,
    launcher=launcher,
    fields=FIELDS,
)
