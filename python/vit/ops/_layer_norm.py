"""Layer normalisation over the last dimension (Ba et al., 2016, arXiv:1607.06450)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import NativeBackend, Spec
from .bound import call
from .launch import acc_dtype, contiguous, kept_positive, launch, ptr, row_count, rows
from .op import Op


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """Normalises each row of `x` to mean 0 and variance 1, then scales and shifts it.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance over the last dimension.

    x [..., C] of any rank >= 1; weight and bias [C] in x's dtype or float32, or None; y like x, contiguous.
    Raises ValueError for sizes that do not fit, BackendError when the named backend cannot run it.
    """
    return call(OP, backend, x=x, weight=weight, bias=bias, eps=eps)


def reference(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """The formula in PyTorch."""
    # The weight's, where there is one: in an ONNX file with sizes left open, only a constant may stand here.
    shape = x.shape[-1:] if weight is None else weight.shape
    return F.layer_norm(x, shape, weight, bias, kept_positive(eps, x.dtype))


def limits(spec: Spec) -> list[str]:
    """None but those of the backend."""
    return []


# ----- native


def arguments(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> tuple[tuple[Any, ...], None]:
    """x, and weight and bias of one dtype, which is x's or float32."""
    shape, dtype = x.shape, x.dtype
    if not shape:
        raise ValueError("vit.ops.layer_norm: x must have at least one dimension, got a scalar")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is None:
            continue
        if p.shape != shape[-1:]:
            raise ValueError(
                f"vit.ops.layer_norm: {name} must have shape [{shape[-1]}], the last dimension of x "
                f"{list(shape)}, got {list(p.shape)}"
            )
        if p.dtype != dtype and p.dtype != torch.float32:
            raise ValueError(f"vit.ops.layer_norm: {name} must be {dtype} like x, or torch.float32, got {p.dtype}")
    if x.is_cuda and torch.is_autocast_enabled("cuda") and dtype in (torch.bfloat16, torch.float16):
        x = x.float()  # torch's autocast list for CUDA has layer_norm under float32; the one for the CPU leaves it
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        weight, bias = weight.float(), bias.float()
    param = weight if weight is not None else bias
    if param is not None and param.dtype not in (x.dtype, torch.float32):
        weight = None if weight is None else weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    return (x, weight, bias, kept_positive(eps, x.dtype)), None


def _param_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """The dtype of weight and bias; x's where there are none."""
    return weight.dtype if weight is not None else bias.dtype if bias is not None else x.dtype


FWD = "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool save) -> (Tensor y, Tensor mean, Tensor rstd)"
FWD_FIELDS = "x weight bias y mean rstd M C x_stride eps dtype param_dtype context"
BWD = (
    "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, ScalarType param_dtype, bool[3] mask)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
BWD_FIELDS = "dy x weight mean rstd dx dweight dbias M C x_stride dtype param_dtype workspace context"


def fwd_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., C], mean and rstd [...]."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not save:
        return y, x.new_empty(0), x.new_empty(0)
    stats = acc_dtype(x.dtype)
    return y, x.new_empty(x.shape[:-1], dtype=stats), x.new_empty(x.shape[:-1], dtype=stats)


def launch_fwd(
    backend: NativeBackend, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [..., C]; mean and rstd [...] to be saved."""
    x, stride = rows(backend, x)
    param_dtype = _param_dtype(x, weight, bias)
    weight, bias = (None if p is None else contiguous(backend, p) for p in (weight, bias))
    shape, dtype, device = x.shape, x.dtype, x.device
    y = backend.empty(shape, dtype, device)
    mean = x.new_empty(shape[:-1], dtype=acc_dtype(dtype)) if save else None
    rstd = torch.empty_like(mean) if mean is not None else None
    backend.lib.layer_norm_fwd(
        ptr(x), ptr(weight), ptr(bias), ptr(y), ptr(mean), ptr(rstd), row_count(shape), shape[-1], stride, eps,
        backend.codes[dtype], backend.codes[param_dtype], *backend.context(device),
    )  # fmt: skip
    return y, mean, rstd


def bwd_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    param_dtype: torch.dtype,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., C], dweight and dbias [C]."""
    c = x.shape[-1]
    return (
        torch.empty_like(dy, memory_format=torch.contiguous_format) if mask[0] else dy.new_empty(0),
        dy.new_empty(c, dtype=param_dtype) if mask[1] else dy.new_empty(0),
        dy.new_empty(c, dtype=param_dtype) if mask[2] else dy.new_empty(0),
    )


def launch_bwd(
    backend: NativeBackend,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    param_dtype: torch.dtype,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [..., C], dweight and dbias [C], each where `mask` wants it."""
    dy, (x, stride) = contiguous(backend, dy), rows(backend, x)
    weight = None if weight is None else contiguous(backend, weight)
    shape, device, codes = x.shape, x.device, backend.codes
    dx = backend.empty(shape, dy.dtype, device) if mask[0] else None
    dweight = dy.new_empty(shape[-1], dtype=param_dtype) if mask[1] else None
    dbias = dy.new_empty(shape[-1], dtype=param_dtype) if mask[2] else None
    fields = (
        ptr(dy), ptr(x), ptr(weight), ptr(mean), ptr(rstd), ptr(dx), ptr(dweight), ptr(dbias),
        row_count(shape), shape[-1], stride, codes[x.dtype], codes[param_dtype],
    )  # fmt: skip
    launch(backend, backend.lib.layer_norm_bwd, fields, device)
    return dx, dweight, dbias


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keeps x, weight and the statistics."""
    x, weight, bias, _ = args
    _, mean, rstd = outputs
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.param_dtype = _param_dtype(x, weight, bias)


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias."""
    x, weight, mean, rstd = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:3])
    grads = kernel(dy, x, weight, mean, rstd, ctx.param_dtype, mask)
    return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None


OP = Op(
    name="layer_norm",
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
)
