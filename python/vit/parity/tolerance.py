"""The tolerance rule: how far a kernel may be from the truth, and the text that says where it was not.

Truth is the reference in float64 on the CPU. With err(a) = max|a - truth| and the relative distance
D(a) = ||a - truth|| / ||truth||, a result passes when

    err(kernel) <= 2 err(torch) + 4 eps(output) max|truth| + 4 eps(accumulator) max(magnitude)
    D(kernel)   <= 2 D(torch)   + eps(output) (1/2 + 4 / sqrt(elements)) + 4 eps(accumulator) D(magnitude)

where `torch` is PyTorch's own op in the kernel's dtype (left out for float64 kernels: they get the noise
alone), `magnitude` is the same formula on the absolute values of its terms, and D(magnitude) is its norm over
that of the truth. The second line is the global cosine check: the cosine between kernel and truth is at least
sqrt(1 - D^2), and unlike the cosine D also sees a wrong scale; roundings of many elements average out, so that
it is much tighter than the first. Products in TF32 are held like a type of 10 fraction bits: eps(output) is 2^-10, and
the factors of PyTorch's own products are rounded to TF32. NaN and both infinities stand exactly
where the truth has them; numbers are compared everywhere else. No case has a tolerance of its own. Measuring
against PyTorch's own error is the idea of the FlashAttention tests (https://github.com/Dao-AILab/flash-attention).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .tf32 import EPS as TF32_EPS


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The verdict on one tensor: `error` and `bound` of the line of the rule that came closest to failing."""

    name: str
    error: float
    bound: float
    ok: bool
    text: str  # what is wrong and where, empty when ok

    @property
    def ratio(self) -> float:
        """error / bound: above 1 is a failure."""
        if self.error == 0:
            return 0.0 if self.ok else math.inf
        return self.error / self.bound if self.bound else math.inf


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compare(
    name: str,
    got: Tensor,
    truth: Tensor,
    baseline: Tensor | None,
    magnitude: Tensor,
    *,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    tf32: bool = False,
) -> Comparison:
    """Holds `got` to `truth` (float64) by the rule above.

    `baseline` is PyTorch's own result, None for float64 kernels; `dtype` is what `got` must be of;
    `compute_dtype` is the dtype of the activations, which fixes the accumulator; `tf32`: its products are in TF32.
    """
    if got.shape != truth.shape or got.dtype != dtype:
        wanted = f"{list(truth.shape)} {dtype}"
        return _refusal(name, f"is {list(got.shape)} {got.dtype}, must be {wanted}")
    got = got.detach().to("cpu", torch.float64)
    wrong = _nonfinite_difference(got, truth)
    if wrong.any():
        return _refusal(
            name,
            f"NaN or Inf differ at {_count(wrong)}, first {_at(got, truth, wrong.flatten().int().argmax())}",
        )
    finite = truth.isfinite()
    if not finite.any():
        return Comparison(name, 0.0, 0.0, True, "")
    zero = torch.zeros_like(truth)
    distance = torch.where(finite, (got - truth).abs(), zero)
    torch_distance = zero
    if baseline is not None:
        difference = (baseline.detach().to("cpu", torch.float64) - truth).abs()
        torch_distance = torch.where(difference.isfinite(), difference, zero)
    truth = torch.where(finite, truth, zero)
    magnitude = torch.where(finite & magnitude.isfinite(), magnitude, zero)

    out_eps = TF32_EPS if tf32 else torch.finfo(dtype).eps
    acc_eps = torch.finfo(accumulator(compute_dtype)).eps
    noise = 4 * out_eps * truth.abs().max().item() + 4 * acc_eps * magnitude.max().item()
    worst, torch_worst = distance.argmax(), torch_distance.argmax()
    error, torch_error = distance.max().item(), torch_distance.max().item()
    bound = 2 * torch_error + noise
    if not error <= bound:
        own = "none, float64 gets the noise alone"
        if baseline is not None:
            own = f"{torch_error:.3g} at {_at(baseline, truth, torch_worst)}"
        text = (
            f"{name}: error {error:.3g} at {_at(got, truth, worst)}; bound {bound:.3g}, "
            f"exceeded by {_count(distance > bound)}\n  torch's own error: {own}; noise {noise:.3g}"
        )
        return Comparison(name, error, bound, False, text)

    norm = truth.norm().item()
    if not norm:
        return Comparison(name, error, bound, True, "")
    apart, torch_apart = distance.norm().item() / norm, torch_distance.norm().item() / norm
    rounding = out_eps * (0.5 + 4 / math.sqrt(truth.numel()))
    apart_bound = 2 * torch_apart + rounding + 4 * acc_eps * magnitude.norm().item() / norm
    if not apart <= apart_bound:
        text = (
            f"{name}: relative distance {apart:.3g} over the whole tensor; bound {apart_bound:.3g}, "
            f"torch's own {torch_apart:.3g}\n  worst element {_at(got, truth, worst)}"
        )
        return Comparison(name, apart, apart_bound, False, text)
    if apart * bound > error * apart_bound:
        return Comparison(name, apart, apart_bound, True, "")
    return Comparison(name, error, bound, True, "")


def _refusal(name: str, why: str) -> Comparison:
    return Comparison(name, math.inf, 0.0, False, f"{name}: {why}")


def _nonfinite_difference(got: Tensor, truth: Tensor) -> Tensor:
    """Where one has a NaN or an infinity and the other has something else."""
    return (got.isnan() != truth.isnan()) | ((got.isinf() | truth.isinf()) & (got != truth) & ~truth.isnan())


def _count(mask: Tensor) -> str:
    return f"{int(mask.sum())} of {mask.numel()} elements"


def _at(got: Tensor | None, truth: Tensor, flat: Tensor) -> str:
    """ "[2, 5]: got 1.5, truth 1.25" for a flat index."""
    assert got is not None
    index = [int(i) for i in torch.unravel_index(flat, truth.shape)]
    return f"{index}: got {got.flatten()[flat].item():.8g}, truth {truth.flatten()[flat].item():.8g}"
