"""C++ kernels on the CPU (csrc/cpu), compiled once per instruction-set level and chosen at run time."""

from __future__ import annotations

import torch

from ._base import HostWorkspace, NativeBackend


class Cpu(NativeBackend):
    name = "cpu"
    priority = 20
    device_types = ("cpu",)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)

    _workspace = HostWorkspace()

    def context(self, device: torch.device) -> tuple[int, int, int, bool]:
        # Asked at every call: DataLoader workers run with one thread, users change it at run time.
        return 0, 0, torch.get_num_threads(), False

    def workspace(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return self._workspace.take(nbytes)


BACKEND = Cpu()
