"""Mojo kernels on the CPU (csrc/mojo), compiled ahead of time once per instruction-set level and chosen at run time."""

from __future__ import annotations

from ._host import HostBackend


class Mojo(HostBackend):
    name = "mojo"
    priority = 15  # below cpu, whose kernels compute the same, above sycl


BACKEND = Mojo()
