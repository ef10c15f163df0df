"""CUDA C++ kernels on NVIDIA GPUs of compute capability 8.0 and newer (csrc/cuda), Hopper's own instructions on 9.0."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Sequence

import torch

from ._base import NativeBackend, Spec, constant

#: The oldest GPU the kernels run on: bfloat16 tensor cores and asynchronous copies begin there.
MIN_CAPABILITY = (8, 0)
#: Of ops that need a newer one: products of e4m3 begin there.
MIN_CAPABILITIES = {"linear_fp8": (8, 9)}


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
            head_dim = spec.shapes.get("q", ("*",))[-1] if spec.op == "attention" else "*"
            why = _unfit(spec.device_index, spec.op)
            if why is None and isinstance(head_dim, int) and spec.dtype in self.codes:
                why = _too_large(spec.device_index, spec.dtype, head_dim, spec.training)
            reasons += [why] if why else []
        return reasons

    @functools.cached_property
    def exported(self) -> ctypes.CDLL:
        """The C functions of the compiled module that are no part of the contract."""
        return ctypes.CDLL(self.lib.__file__)

    def context(self, device: torch.device) -> tuple[int, int, int, bool]:
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch._C._cuda_getCurrentRawStream(index), index, 1, tf32_allowed()


def _tf32_by_backend() -> bool:
    """By torch.backends.cuda.matmul.fp32_precision, which follows the former switches as well."""
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"


def _tf32_by_precision() -> bool:
    """By torch.set_float32_matmul_precision, and torch.backends.cuda.matmul.allow_tf32, which sets it."""
    return torch.get_float32_matmul_precision() != "highest"


#: Whether products of float32 may be taken in TF32, asked in every call. torch 2.9 has new switches, after whose use
#: torch.get_float32_matmul_precision() raises.
tf32_allowed = _tf32_by_backend if hasattr(torch._C, "_get_fp32_precision_getter") else _tf32_by_precision


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _code_for(
    capability: tuple[int, int], architectures: str, least: tuple[int, int] = MIN_CAPABILITY
) -> tuple[bool, bool]:
    """Whether a build for these architectures (CMake's words) has machine code for a GPU, and PTX that it could run.

    Machine code runs on GPUs of its major and an equal or higher minor number. PTX, all of it, is of the lowest one.
    Kernels that need more than a listed 8.x are compiled for the `least` that runs them (csrc/cuda/CMakeLists.txt).
    """
    words = re.findall(r"(\d+)[af]?(-real|-virtual)?", architectures)
    found = [(max(divmod(int(n), 10), least), kind) for n, kind in words]
    machine = any(
        kind != "-virtual" and major == capability[0] and minor <= capability[1] for (major, minor), kind in found
    )
    lowest = min((version for version, _ in found), default=least)
    return machine, any(kind != "-real" for _, kind in found) and lowest <= capability


@functools.cache
def _facts(info: Callable[[], Sequence[tuple[str, str]]]) -> dict[str, str]:
    """What a compiled module says of itself and the driver; it asks every device for as much."""
    return dict(info())


@constant
def _unfit(index: int | None, op: str) -> str | None:
    """Why no kernel of an op in this build runs on a GPU: it is too old, or there is no code for it that the driver
    takes."""
    capability = torch.cuda.get_device_capability(index)
    shown = f"compute capability {capability[0]}.{capability[1]} of {torch.cuda.get_device_name(index)}"
    least = MIN_CAPABILITIES.get(op, MIN_CAPABILITY)
    if capability < least:
        return f"{shown} is below {least[0]}.{least[1]}"
    facts = _facts(BACKEND.lib.info)
    machine_code, ptx = _code_for(capability, facts["architectures"], least)
    if not machine_code and not ptx:
        wanted = "".join(map(str, capability))
        return (
            f"{shown} has no code in this build, which is for {facts['architectures']}: "
            f"rebuild with -DCMAKE_CUDA_ARCHITECTURES={wanted}"
        )
    if not machine_code and _version(facts["driver"]) < _version(facts["runtime"]):
        return (
            f"{shown} would run these kernels from PTX of CUDA {facts['runtime']}, newer than the driver's "
            f"{facts['driver']}: update the driver, or rebuild with an older toolkit"
        )
    return None


@constant
def _too_large(index: int | None, dtype: torch.dtype, head_dim: int, training: bool) -> str | None:
    """Why attention is too large for a GPU: the shared memory of a block, by the table of csrc/cuda/attention.cu."""
    limit = BACKEND.exported.vit_cuda_shared_limit(torch.cuda.current_device() if index is None else index)
    for direction in ("forward", "backward") if training else ("forward",):
        needed = BACKEND.exported.vit_cuda_attention_shared(BACKEND.codes[dtype], head_dim, direction == "backward")
        if needed > limit:
            return (
                f"head dimension {head_dim} in {str(dtype).removeprefix('torch.')} needs {needed} bytes of shared "
                f"memory per block in the {direction}, {torch.cuda.get_device_name(index)} has {limit}"
            )
    return None


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
    if _version(facts["driver"])[0] < _version(facts["runtime"])[0]:
        return (
            f"the driver supports CUDA {facts['driver']}, these kernels were built with {facts['runtime']}: "
            "update the driver, or rebuild with an older toolkit"
        )
    if not torch.cuda.is_available() or facts["devices"] == "0":
        return f"no CUDA device is visible ({facts.get('error', 'torch.cuda.is_available() is False')})"
    return ""


BACKEND = Cuda()
