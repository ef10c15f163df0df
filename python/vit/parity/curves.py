"""The activations in PyTorch, and how steep they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activated(x: Tensor, activation: str) -> Tensor:
    """PyTorch's own op; of the quick GELU the formula of OpenAI's CLIP."""
    if activation in ("silu", "relu"):
        return F.silu(x) if activation == "silu" else F.relu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def curve(x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """|f|, |f'| and |f''| of an activation at x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = activated(x, activation)
        (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    return value.detach().abs(), first.detach().abs(), second.abs()
