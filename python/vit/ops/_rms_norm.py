"""Root-mean-square normalisation over the last dimension (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import NativeBackend, Spec
from .bound import call
from .launch import acc_dtype, contiguous, kept_positive, launch, ptr, row_count, rows
from .op import Op


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """Divides each row of `x` by its root mean square, then scales it.

    y = x / sqrt(mean(x^2) + eps) * weight, with the mean over the last dimension.

    x [..., C] of any rank >= 1; weight [C] in x's dtype or float32, or None; y like x, contiguous.
    Raises ValueError for sizes that do not fit, BackendError when the named backend cannot run it.
    """
    return call(OP, backend, x=x, weight=weight, eps=eps)


def reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """The formula in PyTorch, computed in float32 or wider: F.rms_norm rounds before the weight, and takes none of
    another dtype."""
    wide = x.to(acc_dtype(x.dtype))
    y = wide * (wide.square().mean(-1, keepdim=True) + kept_positive(eps, x.dtype)).rsqrt()
    return (y if weight is None else y * weight).to(_result_dtype(x))


def _result_dtype(x: Tensor) -> torch.dtype:
    """x's dtype; float32 where autocast says so: its list for CUDA has rms_norm, the one for the CPU has not."""
    low = x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if low else x.dtype


def limits(spec: Spec) -> list[str]:
    """None but those of the backend."""
    return []


# ----- native


def arguments(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[tuple[Any, ...], None]:
    """x, and a weight in its dtype or float32."""
    if not x.shape:
        raise ValueError("vit.ops.rms_norm: x must have at least one dimension, got a scalar")
    if weight is not None:
        if weight.shape != x.shape[-1:]:
            raise ValueError(
                f"vit.ops.rms_norm: weight must have shape [{x.shape[-1]}], the last dimension of x "
                f"{list(x.shape)}, got {list(weight.shape)}"
            )
        if weight.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"vit.ops.rms_norm: weight must be {x.dtype} like x, or torch.float32, got {weight.dtype}")
    x = x.to(_result_dtype(x))
    if weight is not None and weight.dtype not in (x.dtype, torch.float32):
        weight = weight.to(x.dtype)
    return (x, weight, kept_positive(eps, x.dtype)), None


FWD = "(Tensor x, Tensor? weight, float eps, bool save) -> (Tensor y, Tensor rstd)"
FWD_FIELDS = "x weight y rstd M C x_stride eps dtype param_dtype context"
BWD = (
    "(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, ScalarType param_dtype, bool[2] mask)"
    " -> (Tensor dx, Tensor dweight)"
)
BWD_FIELDS = "dy x weight rstd dx dweight M C x_stride dtype param_dtype workspace context"


def fwd_fake(x: Tensor, weight: Tensor | None, eps: float, save: bool) -> tuple[Tensor, Tensor]:
    """y [..., C], rstd [...]."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[:-1], dtype=acc_dtype(x.dtype)) if save else x.new_empty(0)


def launch_fwd(
    backend: NativeBackend, x: Tensor, weight: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Tensor | None]:
    """y [..., C]; rstd [...] = 1 / sqrt(mean(x^2) + eps) to be saved."""
    x, stride = rows(backend, x)
    weight = None if weight is None else contiguous(backend, weight)
    shape, dtype, device, codes = x.shape, x.dtype, x.device, backend.codes
    y = backend.empty(shape, dtype, device)
    rstd = x.new_empty(shape[:-1], dtype=acc_dtype(dtype)) if save else None
    backend.lib.rms_norm_fwd(
        ptr(x), ptr(weight), ptr(y), ptr(rstd), row_count(shape), shape[-1], stride, eps,
        codes[dtype], codes[dtype if weight is None else weight.dtype], *backend.context(device),
    )  # fmt: skip
    return y, rstd


def bwd_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, param_dtype: torch.dtype, mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """dx [..., C], dweight [C]."""
    return (
        torch.empty_like(dy, memory_format=torch.contiguous_format) if mask[0] else dy.new_empty(0),
        dy.new_empty(x.shape[-1], dtype=param_dtype) if mask[1] else dy.new_empty(0),
    )


def launch_bwd(
    backend: NativeBackend,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    param_dtype: torch.dtype,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dx [..., C], dweight [C], each where `mask` wants it."""
    dy, (x, stride) = contiguous(backend, dy), rows(backend, x)
    weight = None if weight is None else contiguous(backend, weight)
    shape, device, codes = x.shape, x.device, backend.codes
    dx = backend.empty(shape, dy.dtype, device) if mask[0] else None
    dweight = dy.new_empty(shape[-1], dtype=param_dtype) if mask[1] else None
    fields = (
        ptr(dy), ptr(x), ptr(weight), ptr(rstd), ptr(dx), ptr(dweight),
        row_count(shape), shape[-1], stride, codes[x.dtype], codes[param_dtype],
    )  # fmt: skip
    launch(backend, backend.lib.rms_norm_bwd, fields, device)
    return dx, dweight


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keeps x, weight and rstd."""
    x, weight, _ = args
    ctx.save_for_backward(x, weight, outputs[1])


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dweight."""
    x, weight, rstd = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:2])
    grads = kernel(dy, x, weight, rstd, x.dtype if weight is None else weight.dtype, mask)
    return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None


OP = Op(
    name="rms_norm",
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
