"""The affine map of a fully connected layer, with the activation and the residual sum that follow it fused in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import DTYPE_CODES, NativeBackend, Spec
from .op import Op, autocast_dtype, call, launch, ptrs, rows

#: Codes of vit::Activation.
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiplies by a weight matrix, adds the bias, applies the activation, adds the residual.

    y = activation(x weight^T + bias) + residual, activation one of None, "gelu" (erf), "gelu_tanh".

    x [..., K], weight [N, K], bias [N] or None; residual [..., N] (the shape of y) or None; y [..., N], contiguous,
    in x's dtype, or in the wider of x's and the residual's. Under autocast the product is in the autocast dtype;
    weight and bias keep theirs, and so do their gradients.
    Raises ValueError for sizes or dtypes that do not fit, BackendError when the named backend cannot run it.
    """
    return call(OP, backend, x=x, weight=weight, bias=bias, activation=activation, residual=residual)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    _activation_code(activation)
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if residual is None else y + residual


def limits(spec: Spec) -> list[str]:
    return []


# ----- native


def arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> tuple[tuple[Any, ...], None]:
    code = _activation_code(activation)
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
    if residual is not None:
        if residual.shape != (*shape[:-1], weight_shape[0]):
            raise ValueError(
                f"vit.ops.linear: residual must have the shape of the result {[*shape[:-1], weight_shape[0]]}, "
                f"got {list(residual.shape)}"
            )
        if residual.dtype != dtype:  # the sum is in the wider type, as torch promotes
            out = torch.promote_types(dtype, residual.dtype)
            if out not in (dtype, torch.float32):
                raise ValueError(f"vit.ops.linear: residual {residual.dtype} does not go with x {dtype}")
            residual = residual.to(out)
    return (x, weight, bias, residual, code), None


def _activation_code(activation: str | None) -> int:
    if activation not in ACTIVATIONS:
        raise ValueError(f"vit.ops.linear: activation must be None, 'gelu' or 'gelu_tanh', got {activation!r}")
    return ACTIVATIONS[activation]


FWD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation, bool save) -> (Tensor y, Tensor preact)"
)
BWD = (
    "(Tensor dy, Tensor? x, Tensor? weight, Tensor? preact, int activation, ScalarType dtype,"
    " ScalarType param_dtype, bool[3] mask) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int, save: bool
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    y = x.new_empty(shape, dtype=x.dtype if residual is None else residual.dtype)
    return y, x.new_empty(shape if save and activation else (0,))


def fwd(
    b: NativeBackend,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    x, x_stride = rows(x)
    weight, weight_stride = rows(weight)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    n, k = weight.shape
    leading, dtype, device, lib = x.shape[:-1], x.dtype, x.device, b.lib
    out_dtype = dtype if residual is None else residual.dtype
    y = b.empty((*leading, n), out_dtype, device)
    preact = b.empty((*leading, n), dtype, device) if save and activation else None

    pointers = ptrs(x, weight, bias, residual, y, preact)
    sizes = (math.prod(leading), n, k, x_stride, weight_stride, activation)
    dtypes = (DTYPE_CODES[dtype], DTYPE_CODES[weight.dtype], DTYPE_CODES[out_dtype])
    launch(b, lib.linear_fwd, lib.linear_fwd_workspace, pointers, (*sizes, *dtypes, *b.context(device)), device)
    return y, preact


def bwd_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    preact: Tensor | None,
    activation: int,
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    n = dy.shape[-1]
    return (
        dy.new_empty((*dy.shape[:-1], _columns(weight)), dtype=dtype) if mask[0] else dy.new_empty(0),
        dy.new_empty((n, _columns(x)), dtype=param_dtype) if mask[1] else dy.new_empty(0),
        dy.new_empty(n, dtype=param_dtype) if mask[2] else dy.new_empty(0),
    )


def bwd(
    b: NativeBackend,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    preact: Tensor | None,
    activation: int,
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    n, k = dy.shape[-1], _columns(x if weight is None else weight)
    dx = b.empty((*dy.shape[:-1], k), dtype, dy.device) if mask[0] else None
    dweight = b.empty((n, k), param_dtype, dy.device) if mask[1] else None
    dbias = dy.new_empty(n, dtype=param_dtype) if mask[2] else None
    x, x_stride = (None, k) if x is None else rows(x)
    weight, weight_stride = (None, k) if weight is None else rows(weight)
    device, lib = dy.device, b.lib

    pointers = ptrs(dy, x, weight, preact, dx, dweight, dbias)
    sizes = (math.prod(dy.shape[:-1]), n, k, x_stride, weight_stride, activation)
    dtypes = (DTYPE_CODES[dtype], DTYPE_CODES[param_dtype], DTYPE_CODES[dy.dtype])
    launch(b, lib.linear_bwd, lib.linear_bwd_workspace, pointers, (*sizes, *dtypes, *b.context(device)), device)
    return dx, dweight, dbias


def _columns(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.shape[-1]


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, weight, _, _, ctx.activation = args
    need_x, need_weight = ctx.needs_input_grad[:2]
    # A frozen layer keeps no activations, the first layer no weight.
    ctx.save_for_backward(
        x if need_weight else None, weight if need_x else None, outputs[1] if ctx.activation else None
    )
    ctx.dtype, ctx.param_dtype = x.dtype, weight.dtype


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, preact = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:3])
    dresidual = dy if ctx.needs_input_grad[3] else None
    if not any(mask):
        return None, None, None, dresidual, None
    grads = kernel(dy, x, weight, preact, ctx.activation, ctx.dtype, ctx.param_dtype, mask)
    return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), dresidual, None


OP = Op("linear", reference, arguments, FWD, fwd_fake, fwd, BWD, bwd_fake, bwd, save, backward, limits)
