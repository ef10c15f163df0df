"""The gradients of a linear layer's weight and bias on any backend, the emulated ones among them."""

from __future__ import annotations

import draw
import torch
import vit
from torch import Tensor

#: (rows, outputs, inputs): less than a tile; several, with odd ends; rows in two parts (gemm_splits).
SIZES = [(5, 3, 2), (70, 136, 200), (2200, 64, 72)]


def check_bias_gradient(backend: str, dtype: torch.dtype, rows: int, n: int, k: int, large: int = 4) -> None:
    """Of whole numbers, whose sums are exact in any order. large: of dy, the largest; where it has more bits than the
    products keep, the gradient of the bias alone is held to that."""
    x = draw.randint(-4, 5, (rows, k)).to(dtype).requires_grad_()
    weight, bias = (draw.randint(-4, 5, size).to(dtype).requires_grad_() for size in ((n, k), (n,)))
    dy = draw.randint(-large, large + 1, (rows, n)).to(dtype)
    y = vit.ops.linear(x, weight, bias, backend=backend)
    dweight, dbias = torch.autograd.grad(y, (weight, bias), dy)

    def same(got: Tensor, truth: Tensor) -> bool:
        return torch.equal(got, truth.to(dtype))

    assert same(dbias, dy.double().sum(0))
    assert large > 4 or same(dweight, dy.double().mT @ x.detach().double())
    (alone,) = torch.autograd.grad(vit.ops.linear(x, weight.detach(), bias, backend=backend), bias, dy)
    assert torch.equal(alone, dbias)
