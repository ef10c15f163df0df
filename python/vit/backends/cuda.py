"""CUDA C++ kernels on NVIDIA GPUs of compute capability 8.0 and newer (csrc/cuda), Hopper's own instructions on 9.0."""

from __future__ import annotations

import torch

from ._base import NativeBackend, Spec, constant

#: The oldest GPU the kernels run on: bfloat16 tensor cores and asynchronous copies begin there.
MIN_CAPABILITY = (8, 0)


class Cuda(NativeBackend):
    name = "cuda"
    priority = 30
    device_types = ("cuda",)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def unavailable(self) -> str | None:
        return super().unavailable() or _no_gpu()

    def default_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cuda")

    def reasons(self, spec: Spec) -> list[str]:
        reasons = super().reasons(spec)
        if spec.device_type == "cuda" and not self.unavailable():
            capability = torch.cuda.get_device_capability()
            if capability < MIN_CAPABILITY:
                reasons.append(
                    f"compute capability {capability[0]}.{capability[1]} of {torch.cuda.get_device_name()} "
                    f"is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
                )
        return reasons

    def context(self, device: torch.device) -> tuple[int, int, int, bool]:
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch._C._cuda_getCurrentRawStream(index), index, 1, torch.get_float32_matmul_precision() != "highest"


@constant
def _no_gpu() -> str | None:
    """Why the compiled kernels cannot run on this machine; None when they can. Constant while the process lives."""
    global _WHY
    if _WHY is None:
        _WHY = _look_for_gpu()
    return _WHY or None


_WHY: str | None = None  # "" once a usable GPU was found


def _look_for_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    facts = dict(BACKEND.lib.info())
    if facts["driver"] == "none":
        return "no NVIDIA driver is installed"
    driver, runtime = (tuple(map(int, facts[key].split("."))) for key in ("driver", "runtime"))
    if driver[0] < runtime[0]:
        return (
            f"the driver supports CUDA {facts['driver']}, these kernels were built with {facts['runtime']}: "
            "update the driver, or rebuild with an older toolkit"
        )
    if not torch.cuda.is_available() or facts["devices"] == "0":
        return f"no CUDA device is visible ({facts.get('error', 'torch.cuda.is_available() is False')})"
    return ""


BACKEND = Cuda()
