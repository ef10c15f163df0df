"""The Gaussian error linear unit and its approximations (Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import NativeBackend, Spec
from .bound import call
from .launch import contiguous, ptr
from .op import Op

#: Name of vit::Activation by torch's name of the approximation; "quick", "silu" and "relu" are ours.
APPROXIMATE = {"none": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu", "silu": "silu", "relu": "relu"}


def gelu(x: Tensor, approximate: str = "none", backend: str = "auto") -> Tensor:
    """Weighs each element by the normal distribution function of its value.

    y = x Phi(x) = x (1 + erf(x / sqrt(2))) / 2 for approximate="none";
    y = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 for approximate="tanh";
    y = x / (1 + exp(-1.702 x)) for approximate="quick", OpenAI CLIP's "quick GELU"; y = x / (1 + exp(-x)) for "silu";
    y = max(x, 0) for "relu", with the derivative 0 at 0.

    x of any shape; y like x, contiguous. As the formula says, gelu(inf) = inf, and gelu(-inf) = -inf * 0 is NaN;
    relu(-inf) is 0.
    Raises ValueError for another approximation, BackendError when the named backend cannot run it.
    """
    return call(OP, backend, x=x, approximate=approximate)


def quick_gelu(x: Tensor, backend: str = "auto") -> Tensor:
    """GELU by the logistic function: y = x / (1 + exp(-1.702 x)); the op `gelu` with approximate="quick"."""
    return gelu(x, "quick", backend)


def silu(x: Tensor, backend: str = "auto") -> Tensor:
    """The sigmoid linear unit: y = x / (1 + exp(-x)); the op `gelu` with approximate="silu"."""
    return gelu(x, "silu", backend)


def relu(x: Tensor, backend: str = "auto") -> Tensor:
    """The rectified linear unit: y = max(x, 0); the op `gelu` with approximate="relu"."""
    return gelu(x, "relu", backend)


def reference(x: Tensor, approximate: str = "none") -> Tensor:
    """The formula in PyTorch; in float64, the truth for every kernel, without the sum 1 + erf, which cancels in the
    left tail: at x = -4.2 PyTorch's float64 GELU is wrong by 2e-13 of its value."""
    _check(approximate)
    if approximate == "relu":
        return F.relu(x)
    if approximate in _FACTORS:
        return _logistic(x, _FACTORS[approximate])
    if x.dtype == torch.float64 and approximate == "none":
        return x * (torch.special.erfc(x * -math.sqrt(0.5)) * 0.5)
    return F.gelu(x, approximate=approximate)


#: c of the logistic function 1 / (1 + exp(-c x)); with 1.702 it is nearest to the normal distribution function.
_FACTORS = {"quick": 1.702, "silu": 1.0}


def _logistic(x: Tensor, factor: float) -> Tensor:
    """x / (1 + exp(-factor x)); in float64 so that the derivative does not cancel either: that of F.silu has
    1 - sigmoid, wrong by 4e-15 at x = 36."""
    if x.dtype == torch.float64:
        return x * F.logsigmoid(factor * x).exp()
    return F.silu(x) if factor == 1 else x * torch.sigmoid(factor * x)


def _check(approximate: str) -> None:
    """ValueError for an unknown approximation."""
    if approximate not in APPROXIMATE:
        known = ", ".join(map(repr, APPROXIMATE))
        raise ValueError(f"vit.ops.gelu: approximate must be one of {known}, got {approximate!r}")


def limits(spec: Spec) -> list[str]:
    """None but those of the backend."""
    return []


# ----- native


def arguments(x: Tensor, approximate: str = "none") -> tuple[tuple[Any, ...], None]:
    """x and the name of its activation."""
    _check(approximate)
    return (x, APPROXIMATE[approximate]), None


FWD = "(Tensor x, str activation, bool save) -> Tensor y"
FWD_FIELDS = "x y n activation dtype context"


def fwd_fake(x: Tensor, activation: str, save: bool) -> Tensor:
    """y, contiguous whatever x is."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def launch_fwd(backend: NativeBackend, x: Tensor, activation: str, save: bool) -> Tensor:
    """y [n]; nothing is saved."""
    x = contiguous(backend, x)
    dtype, device = x.dtype, x.device
    y = backend.empty(x.shape, dtype, device)
    backend.lib.gelu_fwd(
        ptr(x), ptr(y), x.numel(), backend.activations[activation], backend.codes[dtype], *backend.context(device)
    )
    return y


BWD = "(Tensor dy, Tensor x, str activation) -> Tensor dx"
BWD_FIELDS = "dy x dx n activation dtype context"


def bwd_fake(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """dx, contiguous whatever dy is."""
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def launch_bwd(backend: NativeBackend, dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """dx [n]."""
    dy, x = contiguous(backend, dy), contiguous(backend, x)
    dtype, device = x.dtype, x.device
    dx = backend.empty(dy.shape, dtype, device)
    code = backend.activations[activation]
    backend.lib.gelu_bwd(ptr(dy), ptr(x), ptr(dx), x.numel(), code, backend.codes[dtype], *backend.context(device))
    return dx


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keeps x."""
    x, ctx.activation = args
    ctx.save_for_backward(x)


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx."""
    (x,) = ctx.saved_tensors
    return kernel(dy, x, ctx.activation), None


OP = Op(
    name="gelu",
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
