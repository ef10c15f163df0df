"""Parameter groups, the learning rate of a step, and the running average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from ..model import VisionTransformer


def make_optimizer(model: VisionTransformer, lr: float, weight_decay: float, beta2: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101); biases, norms and what model.no_weight_decay() names are not decayed."""
    kept = set(model.no_weight_decay())
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and name not in kept].append(parameter)
    # One fused kernel over all parameters: small models spend more time in the launches than in the
    # arithmetic.
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, beta2),
        fused=True,
    )


def learning_rate(step: int, total: int, warmup: int, peak: float, low: float) -> float:
    """Linear from peak / warmup at step 0 to peak, then half a cosine that would reach `low` at step
    `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def used_decay(decay: float, step: int) -> float:
    """The decay of the average at optimizer step `step` (counted from 1): min(decay, (1 + t) / (10 + t)), so that the
    random start is soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


class Average:
    """An exponential moving average of a model's weights: average += (1 - decay) (weights - average). The decay of step
    t is used_decay(decay, t), which is smaller at first.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average after optimizer step `step` (counted from 1)."""
        weight = 1.0 - used_decay(self.decay, step)
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)
