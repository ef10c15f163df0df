"""What linear_int8 and linear_fp8 must give on any backend, the emulated ones among them."""

from __future__ import annotations

from typing import Any

import draw
import torch
import vit
from torch import Tensor
from vit.ops.quantized import FP8, INT8, Format

#: The parameter of tests that are about both.
FORMS = {"argvalues": (INT8, FP8), "ids": lambda form: form.name}

#: Steepest slope of an activation (gelu's, 1.13) with its own rounding.
SLOPE = 1.2


def layer(n: int, k: int, form: Format = INT8) -> tuple[Tensor, Tensor]:
    """A weight [n, k] in bytes, and the scale of each row."""
    weight, scale = form.quantize_rows(draw.randn(n, k))
    return weight, scale.flatten()


def run(form: Format, backend: str, device: torch.device, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """A call with everything on the device; its result on the CPU."""
    there = [t.to(device) if isinstance(t, Tensor) else t for t in (x, weight, *rest)]
    return getattr(vit.ops, form.routine)(*there, backend=backend).cpu()


def lost(form: Format, q: Tensor, weight: Tensor) -> Tensor:
    """How far the sum of q [M, K] weight [N, K] may be from the exact one, [M, N]: 36 2^-13 sum |q weight| for e4m3.

    Tensor cores of 8.9 add 32 products, each of them exact, with a fraction of 13 bits: what lies below 2^-13 of the
    largest number in an addition is cut off, in whatever order they add. No number is larger than S, the sum of the 32
    sizes, and at most 34 are cut off, the result and a first sum of half of them among them: 34 2^-13 S. The sums of 32
    are added in float32: K / 32 <= 2^12 roundings of at most 2^-24 of the sum of all sizes are 2 2^-13 of it.
    """
    if form is INT8:
        return torch.zeros(len(q), len(weight), dtype=torch.float64)
    return 36 * 2.0**-13 * (q.double().abs() @ weight.double().abs().T)


def check_sums(
    form: Format, backend: str, device: torch.device, x: Tensor, weight: Tensor, weight_scale: Tensor
) -> Tensor:
    """A product without bias and activation: to the bit where sums are exact, else within what may be lost."""
    y = run(form, backend, device, x, weight, weight_scale)
    expected = run(form, "reference", torch.device("cpu"), x, weight, weight_scale)
    if form is INT8:
        assert torch.equal(y, expected)
        return y
    q, x_scale = form.quantize_rows(x)
    bound = lost(form, q, weight) * x_scale.double() * weight_scale.double()
    # Both are rounded: the sum and its two factors in float32, the result in its type.
    bound += (4 * 2.0**-24 + torch.finfo(y.dtype).eps) * expected.double().abs()
    assert ((y.double() - expected.double()).abs() <= bound).all()
    return y


def check_exact(form: Format, backend: str, device: torch.device, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Small whole numbers, of which no sum of 32 has more than 13 bits: another element or place is another number."""
    x, weight = draw.randint(-4, 5, (m, k + 1)).to(dtype), draw.randint(-4, 5, (n, k + 1))
    x[:, 0], weight[:, 0] = form.largest, 0  # the scale is 1, whatever the others are
    expected = x.double() @ weight.double().T
    y = run(form, backend, device, x, weight.to(form.dtype), torch.ones(n))
    assert torch.equal(y.double(), expected.to(dtype).double())
    assert torch.equal(run(form, backend, device, x[-1:], weight.to(form.dtype), torch.ones(n)), y[-1:])


def check_conversion(form: Format, backend: str, device: torch.device) -> None:
    """Every number of the format, those half-way between two and their neighbours, as the reference rounds them."""
    codes = torch.arange(256, dtype=torch.uint8).view(form.dtype).float()
    codes = codes[codes.abs() <= form.largest].sort().values
    halves = (codes[1:] + codes[:-1]) / 2
    halves = torch.cat([halves, halves.nextafter(torch.tensor(torch.inf)), halves.nextafter(torch.tensor(-torch.inf))])
    tiny = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 2.0**-10, -(2.0**-10), 2.0**-149])
    x = torch.cat([codes, halves, tiny, torch.tensor([form.largest])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 60)).reshape(-1, 60)
    x = torch.cat([x, torch.full((len(x), 1), form.largest)], 1)
    x = torch.cat([x, x * 0.37])  # and where the scale is no power of two
    y = run(form, backend, device, x, torch.eye(61).to(form.dtype), torch.ones(61))
    q, scale = form.quantize_rows(x)
    assert torch.equal(y, q.float() * scale)


def check_epilogue(
    backend: str, device: torch.device, activation: str | None, wide: bool, dtype: torch.dtype, form: Format = INT8
) -> None:
    """Bias, activation, scale and residual: at most twice the error of the formula in PyTorch, plus its rounding, plus
    what sums may lose."""
    x, (weight, weight_scale) = draw.randn(2, 19, 70).to(dtype), layer(45, 70, form)
    bias, scale = draw.randn(45), draw.randn(45).to(torch.float32 if wide else dtype)
    residual = draw.randn(2, 19, 45).to(torch.float32 if wide else dtype)
    q, x_scale = form.quantize_rows(x)
    exact = vit.ops.linear(
        q.double() * x_scale.double(), weight.double() * weight_scale.double()[:, None], bias.double(),
        activation, residual.double(), scale.double(), backend="reference",
    )  # fmt: skip
    given = x, weight, weight_scale, bias, activation, residual, scale
    y = run(form, backend, device, *given)
    reference = run(form, "reference", torch.device("cpu"), *given)
    assert y.dtype == reference.dtype == (torch.float32 if wide else dtype)
    noise = torch.finfo(y.dtype).eps * exact.abs()
    sums = lost(form, q.flatten(0, 1), weight).reshape(exact.shape) * x_scale.double() * weight_scale.double()
    bound = 2 * (reference.double() - exact).abs().max() + noise + SLOPE * scale.double().abs() * sums
    assert ((y.double() - exact).abs() <= bound).all()


def check_rows_without_a_scale(backend: str, device: torch.device, form: Format = INT8) -> None:
    """NaN where a row holds a NaN or an infinity, and nowhere else."""
    x, (weight, scale) = draw.randn(4, 37), layer(20, 37, form)
    x[1, 3], x[2, 36] = torch.nan, -torch.inf
    y = run(form, backend, device, x, weight, scale)
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    assert y[[0, 3]].isfinite().all()


def check_long_sums(backend: str, device: torch.device) -> None:
    """A large product and many that lie below 2^-13 of it: in one sum of 14 bits all of them would be lost, a tenth."""
    x, weight = torch.full((1, 1024), 15.0), torch.ones(1, 1024)
    x[0, 0] = weight[0, 0] = 448.0
    y = check_sums(FP8, backend, device, x, weight.to(FP8.dtype), torch.ones(1))
    assert abs(y.item() - (448 * 448 + 15 * 1023)) < 500  # 465 are lost of the first 32 at most


def check_weights_that_are_nan(backend: str, device: torch.device) -> None:
    """A NaN among the weights of an output is its NaN, also beside inputs of zero."""
    x, (weight, scale) = draw.randn(5, 40), layer(9, 40, FP8)
    weight.view(torch.uint8)[3, 7] = 0x7F
    weight.view(torch.uint8)[8, 39] = 0xFF
    x[0] = 0
    y = run(FP8, backend, device, x, weight, scale)
    assert y.isnan().all(0).nonzero().flatten().tolist() == [3, 8]
    assert y[:, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()
