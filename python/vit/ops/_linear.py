"""The affine map of a fully connected layer, with the activation, the scale and the residual sum that follow it fused
in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import NativeBackend, Spec
from . import _gelu
from .bound import call
from .launch import acc_dtype, autocast_dtype, contiguous, launch, ptr, row_count, rows
from .op import Op

#: Names of vit::Activation by ours.
ACTIVATIONS = {None: "none"} | {name: name for name in _gelu.APPROXIMATE.values()}
_APPROXIMATE = {name: approximate for approximate, name in _gelu.APPROXIMATE.items()}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiplies by a weight matrix, adds the bias, applies activation and scale, adds the residual.

    y = scale * activation(x weight^T + bias) + residual, activation one of None, "gelu" (erf), "gelu_tanh",
    "quick_gelu", "silu", "relu" (formulas: vit.ops.gelu). The scale is that of LayerScale (Touvron et al., 2021,
    arXiv:2103.17239).

    x [..., K], weight [N, K], bias [N] or None; residual [..., N] (the shape of y) or None; scale [N] or None;
    y [..., N], contiguous, in x's dtype, or in the widest of x's, the residual's and the scale's. Under autocast the
    product is in the autocast dtype; weight and bias keep theirs, and so do their gradients.
    Raises ValueError for sizes or dtypes that do not fit, BackendError when the named backend cannot run it.
    """
    return call(OP, backend, x=x, weight=weight, bias=bias, activation=activation, residual=residual, scale=scale)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The formula in PyTorch."""
    _activation_name(activation)
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = _gelu.reference(y, _APPROXIMATE[activation])
    if scale is not None:
        y = y * scale
    return y if residual is None else y + residual


def limits(spec: Spec) -> list[str]:
    """None but those of the backend."""
    return []


# ----- native


def arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[tuple[Any, ...], Callable[[Tensor], Tensor] | None]:
    """x, weight, bias and residual in dtypes that go together, and the name of the activation."""
    name = _activation_name(activation)
    shape, weight_shape, dtype, param_dtype = x.shape, weight.shape, x.dtype, weight.dtype
    if not shape or len(weight_shape) != 2 or shape[-1] != weight_shape[1]:
        raise ValueError(
            f"vit.ops.linear: x [..., K] and weight [N, K] differ in K: {list(shape)} and {list(weight_shape)}"
        )
    if bias is not None and bias.shape != weight_shape[:1]:
        raise ValueError(f"vit.ops.linear: bias must have shape [{weight_shape[0]}], got {list(bias.shape)}")
    if (wanted := autocast_dtype(x)) is not None and param_dtype != torch.float64:
        x, dtype = x.to(wanted), wanted
        if param_dtype != torch.float32:
            weight, param_dtype = weight.to(wanted), wanted
    elif param_dtype != dtype:
        raise ValueError(f"vit.ops.linear: x and weight must have one dtype, got {dtype} and {param_dtype}")
    if bias is not None and bias.dtype != param_dtype:
        bias = bias.to(param_dtype)
    if residual is not None and residual.shape != (*shape[:-1], weight_shape[0]):
        raise ValueError(
            f"vit.ops.linear: residual must have the shape of the result {[*shape[:-1], weight_shape[0]]}, "
            f"got {list(residual.shape)}"
        )
    if scale is not None and scale.shape != weight_shape[:1]:
        raise ValueError(f"vit.ops.linear: scale must have shape [{weight_shape[0]}], got {list(scale.shape)}")
    out = dtype if residual is None and scale is None else _out_dtype(dtype, residual=residual, scale=scale)
    if residual is not None and residual.dtype != out:
        residual = residual.to(out)
    if scale is not None:
        scale = scale.to(acc_dtype(dtype))
    return (x, weight, bias, scale, residual, name, out), None


def _out_dtype(dtype: torch.dtype, **others: Tensor | None) -> torch.dtype:
    """The widest type, as torch promotes; ValueError where it is neither x's nor float32."""
    out = dtype
    for name, other in others.items():
        if other is None or other.dtype == dtype:
            continue
        out = torch.promote_types(out, other.dtype)
        if out not in (dtype, torch.float32):
            raise ValueError(f"vit.ops.linear: {name} {other.dtype} does not go with x {dtype}")
    return out


def _activation_name(activation: str | None) -> str:
    """vit::Activation's name of it; ValueError for an unknown one."""
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"vit.ops.linear: activation must be one of {known}, got {activation!r}")
    return ACTIVATIONS[activation]


FWD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, str activation, ScalarType out_dtype,"
    " bool save) -> (Tensor y, Tensor preact)"
)
FWD_FIELDS = (
    "x weight bias scale residual y preact M N K x_stride weight_stride activation dtype param_dtype out_dtype"
    " workspace context"
)
BWD = (
    "(Tensor dy, Tensor? x, Tensor? weight, Tensor? scale, Tensor? preact, str activation, ScalarType dtype,"
    " ScalarType param_dtype, bool[4] mask) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale)"
)
BWD_FIELDS = (
    "dy x weight scale preact dx dweight dbias dscale M N K x_stride weight_stride activation dtype param_dtype"
    " out_dtype workspace context"
)


def fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y and preact [..., N]."""
    shape = (*x.shape[:-1], weight.shape[0])
    preact = save and (activation != "none" or scale is not None)
    return x.new_empty(shape, dtype=out_dtype), x.new_empty(shape if preact else (0,))


def launch_fwd(
    backend: NativeBackend,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """y [..., N]; preact [..., N] to be saved where there is an activation, or a scale."""
    x, x_stride = rows(backend, x)
    weight, weight_stride = rows(backend, weight)
    bias = None if bias is None else contiguous(backend, bias)
    scale = None if scale is None else contiguous(backend, scale)
    residual = None if residual is None else contiguous(backend, residual)
    n, k = weight.shape
    shape, dtype, device, codes = (*x.shape[:-1], n), x.dtype, x.device, backend.codes
    y = backend.empty(shape, out_dtype, device)
    keep = save and (activation != "none" or scale is not None)
    preact = backend.empty(shape, dtype, device) if keep else None
    fields = (
        x.data_ptr(), weight.data_ptr(), ptr(bias), ptr(scale), ptr(residual), y.data_ptr(), ptr(preact),
        row_count(shape), n, k, x_stride, weight_stride, backend.activations[activation],
        codes[dtype], codes[weight.dtype], codes[out_dtype],
    )  # fmt: skip
    launch(backend, backend.lib.linear_fwd, fields, device)
    return y, preact


def bwd_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    preact: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx [..., K], dweight [N, K], dbias and dscale [N]."""
    n = dy.shape[-1]
    return (
        dy.new_empty((*dy.shape[:-1], _columns(weight)), dtype=dtype) if mask[0] else dy.new_empty(0),
        dy.new_empty((n, _columns(x)), dtype=param_dtype) if mask[1] else dy.new_empty(0),
        dy.new_empty(n, dtype=param_dtype) if mask[2] else dy.new_empty(0),
        dy.new_empty(n, dtype=acc_dtype(dtype)) if mask[3] else dy.new_empty(0),
    )


def launch_bwd(
    backend: NativeBackend,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    preact: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """dx [..., K], dweight [N, K], dbias and dscale [N], each where `mask` wants it."""
    dy = contiguous(backend, dy)
    scale = None if scale is None else contiguous(backend, scale)
    shape, device, codes = dy.shape, dy.device, backend.codes
    n, k = shape[-1], _columns(x if weight is None else weight)
    dx = backend.empty((*shape[:-1], k), dtype, device) if mask[0] else None
    dweight = backend.empty((n, k), param_dtype, device) if mask[1] else None
    dbias = dy.new_empty(n, dtype=param_dtype) if mask[2] else None
    dscale = dy.new_empty(n, dtype=acc_dtype(dtype)) if mask[3] else None
    x, x_stride = (None, k) if x is None else rows(backend, x)
    weight, weight_stride = (None, k) if weight is None else rows(backend, weight)
    fields = (
        ptr(dy), ptr(x), ptr(weight), ptr(scale), ptr(preact), ptr(dx), ptr(dweight), ptr(dbias), ptr(dscale),
        row_count(shape), n, k, x_stride, weight_stride, backend.activations[activation],
        codes[dtype], codes[param_dtype], codes[dy.dtype],
    )  # fmt: skip
    launch(backend, backend.lib.linear_bwd, fields, device)
    return dx, dweight, dbias, dscale


def _columns(matrix: Tensor | None) -> int:
    """K of x or of the weight; 0 where it was not kept."""
    return 0 if matrix is None else matrix.shape[-1]


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keeps what the wanted gradients need of x, weight, scale and preact."""
    x, weight, _, scale, _, ctx.activation, _ = args
    need_x, need_weight, need_bias, need_scale = ctx.needs_input_grad[:4]
    # A frozen layer keeps no activations, the first layer no weight.
    ctx.save_for_backward(
        x if need_weight else None,
        weight if need_x else None,
        scale if need_x or need_weight or need_bias else None,
        outputs[1] if ctx.activation != "none" or need_scale else None,
    )
    ctx.dtype, ctx.param_dtype = x.dtype, weight.dtype


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias, dscale, and dy itself for the residual."""
    x, weight, scale, preact = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:4])
    dresidual = dy if ctx.needs_input_grad[4] else None
    if not any(mask):
        return None, None, None, None, dresidual, None, None
    grads = kernel(dy, x, weight, scale, preact, ctx.activation, ctx.dtype, ctx.param_dtype, mask)
    return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), dresidual, None, None


OP = Op(
    name="linear",
    reference=reference,
    limits=limits,
    arguments=arguments,
    fwd_schema=FWD,
    fwd_fake=fwd_fake,
    launch_fwd=launch_fwd,
    fwd_fields=FWD_FIELDS,
    bwd_schema=BWD,
    bwd_fake=bwd_fake,
    launch_bwd=launch_bwd,
    bwd_fields=BWD_FIELDS,
    save=save,
    backward=backward,
    autocasts=True,
)
