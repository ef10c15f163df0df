"""The scale of the loss under float16, whose smallest gradients would be zeros without one (arXiv:1710.03740)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..backends import get
from .state import Progress

GROWTH_STEPS = 2000  # steps without an overflow after which the scale doubles: torch.amp.GradScaler's
LARGEST, SMALLEST = 2.0**24, 1.0


class LossScale:
    """A power of two by which the loss is multiplied and the gradients are divided. It is halved when a gradient
    overflows and doubled after GROWTH_STEPS steps without one; `progress` holds both numbers, so that a training goes
    on with them. `enabled`: False leaves loss and gradients alone.
    """

    def __init__(self, progress: Progress, enabled: bool) -> None:
        self.progress, self.enabled = progress, enabled

    @property
    def factor(self) -> float:
        """What the loss is multiplied by."""
        return self.progress.loss_scale if self.enabled else 1.0

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divides the gradients, exactly: by a power of two."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.enabled and gradients:
            torch._foreach_mul_(gradients, 1 / self.factor)

    def update(self, finite: bool) -> bool:
        """Takes note of a step; whether it has only overflowed, so that a smaller scale may help."""
        if not self.enabled:
            return False
        progress = self.progress
        if finite:
            progress.scaled_steps += 1
            if progress.scaled_steps >= GROWTH_STEPS:
                progress.loss_scale, progress.scaled_steps = min(LARGEST, 2 * progress.loss_scale), 0
            return False
        overflowed = progress.loss_scale > SMALLEST
        progress.loss_scale, progress.scaled_steps = max(SMALLEST, progress.loss_scale / 2), 0
        return overflowed


def check_fp16(plan: dict[str, str]) -> None:
    """ValueError names the backends of a model's plan that have no float16."""
    for name in sorted(set(plan.values())):
        kinds = get(name).dtypes
        if torch.float16 not in kinds:
            known = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
            raise ValueError(
                f"vit: --amp fp16: the {name} backend has no float16, only {known}; use --amp bf16 or another --backend"
            )
