"""The Gaussian error linear unit (Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import DTYPE_CODES, NativeBackend, Spec
from .op import Op, call, ptr

#: Codes of vit::Activation by torch's name of the approximation.
APPROXIMATE = {"none": 1, "tanh": 2}


def gelu(x: Tensor, approximate: str = "none", backend: str = "auto") -> Tensor:
    """Weighs each element by the normal distribution function of its value.

    y = x Phi(x) = x (1 + erf(x / sqrt(2))) / 2 for approximate="none";
    y = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 for approximate="tanh".

    x of any shape; y like x, contiguous. As the formula says, gelu(inf) = inf, and gelu(-inf) = -inf * 0 is NaN.
    Raises ValueError for another approximation, BackendError when the named backend cannot run it.
    """
    return call(OP, backend, x=x, approximate=approximate)


def reference(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def limits(spec: Spec) -> list[str]:
    return []


# ----- native


def arguments(x: Tensor, approximate: str = "none") -> tuple[tuple[Any, ...], None]:
    if approximate not in APPROXIMATE:
        raise ValueError(f"vit.ops.gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return (x, APPROXIMATE[approximate]), None


FWD = "(Tensor x, int activation, bool save) -> Tensor y"
BWD = "(Tensor dy, Tensor x, int activation) -> Tensor dx"


def fwd_fake(x: Tensor, activation: int, save: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def fwd(b: NativeBackend, x: Tensor, activation: int, save: bool) -> Tensor:
    x = x.contiguous()
    y = b.empty(x.shape, x.dtype, x.device)
    b.lib.gelu_fwd(ptr(x), ptr(y), x.numel(), activation, DTYPE_CODES[x.dtype], *b.context(x.device))
    return y


def bwd_fake(dy: Tensor, x: Tensor, activation: int) -> Tensor:
    return torch.empty_like(dy)


def bwd(b: NativeBackend, dy: Tensor, x: Tensor, activation: int) -> Tensor:
    x = x.contiguous()
    dx = b.empty(dy.shape, dy.dtype, dy.device)
    b.lib.gelu_bwd(ptr(dy), ptr(x), ptr(dx), x.numel(), activation, DTYPE_CODES[x.dtype], *b.context(x.device))
    return dx


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, ctx.activation = args
    ctx.save_for_backward(x)


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return kernel(dy, x, ctx.activation), None


OP = Op("gelu", reference, arguments, FWD, fwd_fake, fwd, BWD, bwd_fake, bwd, save, backward, limits)
