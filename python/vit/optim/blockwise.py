"""Numbers of 8 bits: blocks of 256 with a scale each, and a code whose steps grow with the value.

Dettmers, Lewis, Shleifer, Zettlemoyer: 8-bit Optimizers via Block-wise Quantization, 2022 (arXiv:2110.02861).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 256


@cache
def code(signed: bool) -> Tensor:
    """The 256 values of the dynamic code, ascending, the largest 1: float32 [256].

    Decade 10^(e - 6), e = 0 ... 6, is divided into 2^e (unsigned: 2^(e + 1)) equal parts, whose middles are values;
    so are 0 and 1, and with a sign the negative ones.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (exponent + (not signed)) + 1, dtype=torch.float64, device="cpu")
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += middles + [-value for value in middles if signed]
    return torch.tensor(sorted(values), dtype=torch.float64, device="cpu").float()


@cache
def _edges(signed: bool) -> Tensor:
    """The middle between each value of the code and the next."""
    values = code(signed)
    return (values[:-1] + values[1:]) / 2


def blocks_of(count: int) -> int:
    """How many blocks hold `count` numbers."""
    return -(-count // BLOCK)


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 [n] -> indices uint8 [n] of the nearest values of the code, and the largest magnitude of each block.

    Without a sign a number that is not 0 does not become 0: it would be divided by.
    """
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, blocks_of(count) * BLOCK - count)).view(-1, BLOCK)
    scales = padded.abs().amax(dim=1)
    shares = padded / torch.where(scales > 0, scales, torch.ones_like(scales))[:, None]
    indices = torch.bucketize(shares, _edges(signed).to(values.device))
    if not signed:
        indices = torch.where(padded > 0, indices.clamp_min(1), indices)
    return indices.to(torch.uint8).view(-1)[:count].contiguous(), scales


def dequantize(indices: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """What `quantize` made of the numbers: float32 [n]."""
    count = indices.numel()
    padded = torch.nn.functional.pad(indices, (0, scales.numel() * BLOCK - count)).view(-1, BLOCK)
    values = code(signed).to(indices.device)[padded.long()] * scales[:, None]
    return values.view(-1)[:count]
