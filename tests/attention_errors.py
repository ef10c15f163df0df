"""How far attention is from the truth where scores are large, against PyTorch's unfused form in the same dtype."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import draw
import torch
import vit
from torch import Tensor

#: Sizes B, N, L, H, D: a ViT's, a rectangle, an uneven head, more than one block of keys.
SHAPES = [(1, 197, 197, 2, 64), (2, 65, 130, 2, 32), (1, 130, 257, 1, 80), (1, 96, 700, 1, 64)]


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(scale q k^T) v by two products and a softmax."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q.shape[-1] ** -0.5 * (q @ k.mT)).softmax(-1) @ v).transpose(1, 2)


def inputs(shape: tuple[int, ...], largest: float, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Random q, k, v and the gradient of the output; the largest |score| of all is `largest`."""
    b, n, length, h, d = shape
    draw.restart("attention_errors", seed)
    q, k, v, dout = (draw.randn(b, tokens, h, d) for tokens in (n, length, length, n))
    scores = d**-0.5 * torch.einsum("bnhd,blhd->bhnl", q.double(), k.double())
    factor = (largest / scores.abs().max().item()) ** 0.5
    return [x.to(dtype) for x in (q * factor, k * factor, v, dout)]


def results(attention: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """out, dq, dk, dv."""
    *leaves, dout = (x.detach().clone() for x in tensors)
    for x in leaves:
        x.requires_grad_()
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def error_ratios(
    backend: str,
    shape: tuple[int, ...],
    largest: float,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seeds: int = 5,
) -> dict[str, float]:
    """The errors of out, dq, dk and dv, as norms of the difference from float64, over those of the unfused form:
    medians of several draws."""
    found: dict[str, list[float]] = {name: [] for name in ("out", "dq", "dk", "dv")}
    for seed in range(seeds):
        tensors = inputs(shape, largest, seed, dtype)
        truth = results(unfused, [x.double() for x in tensors])
        plain = results(unfused, tensors)
        given = [x.to(device) for x in tensors]
        got = results(lambda q, k, v: vit.ops.attention(q, k, v, backend=backend), given)
        for ratios, exact, base, own in zip(found.values(), truth, plain, got, strict=True):
            error, of_base = (x.to("cpu", torch.float64) - exact for x in (own, base))
            ratios.append((error.norm() / of_base.norm()).item())
    return {name: statistics.median(ratios) for name, ratios in found.items()}
