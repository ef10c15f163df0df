"""C++ kernels on the CPU (csrc/cpu), compiled once per instruction-set level and chosen at run time."""

from __future__ import annotations

from ._host import HostBackend


class Cpu(HostBackend):
    name = "cpu"
    priority = 20


BACKEND = Cpu()
