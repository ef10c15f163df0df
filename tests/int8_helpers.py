"""What linear_int8 must give on any backend, the emulated ones among them."""

from __future__ import annotations

import draw
import torch
import vit
from torch import Tensor
from vit.ops._linear_int8 import quantize_rows


def layer(n: int, k: int) -> tuple[Tensor, Tensor]:
    """A weight [n, k] in bytes, and the scale of each row."""
    weight, scale = quantize_rows(draw.randn(n, k))
    return weight, scale.flatten()


def check_epilogue(backend: str, device: torch.device, activation: str | None, wide: bool, dtype: torch.dtype) -> None:
    """Bias, activation, scale and residual: at most twice the error of the formula in PyTorch, plus its rounding."""
    x, (weight, weight_scale) = draw.randn(2, 19, 70).to(dtype), layer(45, 70)
    bias, scale = draw.randn(45), draw.randn(45).to(torch.float32 if wide else dtype)
    residual = draw.randn(2, 19, 45).to(torch.float32 if wide else dtype)
    q, x_scale = quantize_rows(x)
    exact = vit.ops.linear(
        q.double() * x_scale.double(), weight.double() * weight_scale.double()[:, None], bias.double(),
        activation, residual.double(), scale.double(), backend="reference",
    )  # fmt: skip
    given = x, weight, weight_scale, bias, activation, residual, scale
    there = [t.to(device) if isinstance(t, Tensor) else t for t in given]
    y = vit.ops.linear_int8(*there, backend=backend).cpu()
    reference = vit.ops.linear_int8(*given, backend="reference")
    assert y.dtype == reference.dtype == (torch.float32 if wide else dtype)
    noise = torch.finfo(y.dtype).eps * exact.abs()
    bound = 2 * (reference.double() - exact).abs().max() + noise
    assert ((y.double() - exact).abs() <= bound).all()


def check_rows_without_a_scale(backend: str, device: torch.device) -> None:
    """NaN where a row holds a NaN or an infinity, and nowhere else."""
    x, (weight, scale) = draw.randn(4, 37), layer(20, 37)
    x[1, 3], x[2, 36] = torch.nan, -torch.inf
    y = vit.ops.linear_int8(x.to(device), weight.to(device), scale.to(device), backend=backend).cpu()
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    assert y[[0, 3]].isfinite().all()
