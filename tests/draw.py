"""Random test inputs that are the same bits everywhere: torch.randn and its family on vit's own streams.

conftest.py begins every test at the same place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vit.support.random import Stream

_stream = Stream("test")


def restart(*key: int | str) -> None:
    """Begins anew: what is drawn from now on depends on the key alone."""
    global _stream
    _stream = Stream("test", *key)


def randn(*size: Any, dtype: torch.dtype | None = None, device: Any = "cpu", requires_grad: bool = False) -> Tensor:
    """As torch.randn: N(0, 1)."""
    dtype = dtype or torch.get_default_dtype()
    drawn = _stream.standard_normal(_shape(size), np.float64 if dtype == torch.float64 else np.float32)
    return torch.from_numpy(drawn).to(device, dtype).requires_grad_(requires_grad)


def randn_like(like: Tensor) -> Tensor:
    """As torch.randn_like."""
    return randn(*like.shape, dtype=like.dtype, device=like.device)


def rand(*size: Any, dtype: torch.dtype | None = None, device: Any = "cpu") -> Tensor:
    """As torch.rand: U[0, 1)."""
    return torch.from_numpy(_stream.uniform(0.0, 1.0, _shape(size))).to(device, dtype or torch.get_default_dtype())


def randint(low: int, high: int, size: Any, dtype: torch.dtype = torch.int64, device: Any = "cpu") -> Tensor:
    """As torch.randint: whole numbers in [low, high)."""
    return torch.from_numpy(np.asarray(_stream.integers(low, high, tuple(size)))).to(device, dtype)


def randperm(count: int) -> Tensor:
    """As torch.randperm: 0 to count - 1 in random order."""
    return torch.from_numpy(_stream.permutation(count))


@torch.no_grad()
def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """As nn.init.normal_: fills with N(mean, std^2)."""
    return tensor.copy_(randn_like(tensor).mul_(std).add_(mean))


def fill(model: nn.Module, std: float) -> nn.Module:
    """Every parameter N(0, std^2), gains of norms N(1, std^2), none at a special value; returns the model."""
    for name, parameter in model.named_parameters():
        normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, std)
    return model


def check_deviation(values: Tensor, std: float, what: str = "") -> None:
    """Asserts that values may have been drawn from N(0, std^2): the deviation of n such numbers has itself a deviation
    of std / sqrt(2 n), of which 4 are allowed (chance exceeds them once in 16,000)."""
    apart = abs(values.detach().double().std().item() - std) / (std / (2 * values.numel()) ** 0.5)
    assert apart < 4, f"{what or 'the values'}: {apart:.2g} deviations from a deviation of {std:g}"


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)
