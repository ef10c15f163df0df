"""What the backends share whose kernels run on the threads of this process: memory, scratch, threads, fork."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ._base import HostWorkspace, NativeBackend
from ._host_memory import LEAST_BYTES, MEMORY


class HostBackend(NativeBackend):
    """Kernels on the CPU that run on the OpenMP threads of the process."""

    device_types = ("cpu",)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)

    _workspace = HostWorkspace()
    moves = True
    repeats_below = LEAST_BYTES  # results that are malloc's
    #: Where large results live.
    memory = MEMORY

    def __init__(self) -> None:
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        """PyTorch's own parallel loops (of the optimizer, the loss, dropout) would wait for ever in a child: OpenMP's
        threads stayed with the parent. One thread needs none of them."""
        loaded = vars(self).get("lib")
        if loaded is not None and dict(loaded.info())["threads"].startswith("one thread"):
            torch.set_num_threads(1)

    def context(self, device: torch.device) -> tuple[int, int, int, bool]:
        # Asked at every call: DataLoader workers run with one thread, users change it at run time.
        return 0, 0, torch.get_num_threads(), False

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self.memory.empty(shape, dtype)

    def scratch(self, device: torch.device) -> tuple[int, int]:
        return self._workspace.held

    def workspace(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return self._workspace.take(nbytes)
