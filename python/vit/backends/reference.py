"""The readable PyTorch reference: every device and dtype torch has, and the oracle of all other backends."""

from __future__ import annotations

import torch

from ._base import Backend, Spec


class Reference(Backend):
    name = "reference"
    priority = 0
    device_types = ("cpu", "cuda", "xpu", "mps", "meta")
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def reasons(self, spec: Spec) -> list[str]:
        return []


BACKEND = Reference()
