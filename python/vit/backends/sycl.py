"""SYCL kernels (csrc/sycl), compiled at run time for an Intel GPU or for SYCL's CPU device."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch

from ._base import HostWorkspace, NativeBackend, Spec, constant
from ._host_memory import MEMORY

#: The library of every 2026 release of the runtime: the compiled module needs one of this name.
LIBRARY = "libsycl.so.9"


class Sycl(NativeBackend):
    name = "sycl"
    priority = 10  # below cpu: for tensors on the CPU these kernels are the second choice
    device_types = ("cpu", "xpu")
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    moves = True
    _workspace = HostWorkspace()
    #: Where large results on the CPU live.
    memory = MEMORY

    def unavailable(self) -> str | None:
        return _no_runtime() or super().unavailable()

    def load(self) -> Any:
        _no_runtime()  # before the module that needs it is imported
        return super().load()

    def default_device(self) -> torch.device:
        if torch.xpu.is_available() and not self.unavailable() and not _foreign_runtime():
            return torch.device("xpu", torch.xpu.current_device())
        return torch.device("cpu")

    def reasons(self, spec: Spec) -> list[str]:
        if refused := self.mismatches(spec):
            return refused  # and nothing of SYCL was loaded to say so
        reasons = super().reasons(spec)
        if spec.device_type == "xpu" and not reasons and (why := _foreign_runtime()):
            reasons.append(why)
        return reasons

    def context(self, device: torch.device) -> tuple[int, int, int, bool]:
        if device.type == "xpu":
            return torch.xpu.current_stream(device).sycl_queue, device.index or 0, 1, False
        return 0, 0, 1, False

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return super().empty(shape, dtype, device) if device.type == "xpu" else self.memory.empty(shape, dtype)

    def scratch(self, device: torch.device) -> tuple[int, int]:
        return (0, 0) if device.type == "xpu" else self._workspace.held

    def workspace(self, nbytes: int, device: torch.device) -> torch.Tensor:
        if device.type == "xpu":
            return super().workspace(nbytes, device)
        return self._workspace.take(nbytes)

    def info(self) -> dict[str, Any]:
        record = super().info()  # compiles, the first time
        with contextlib.suppress(PackageNotFoundError):  # oneAPI's own, not a wheel
            record["runtime version"] = version("intel-sycl-rt")
        log = _compiler_log()
        return record | ({"compiler log": log} if log else {})


@functools.cache
def _function(name: str, result: Any) -> Any:
    """A C function of the compiled module."""
    function = getattr(ctypes.CDLL(sys.modules["vit._sycl"].__file__), name)
    function.restype = result
    return function


@constant
def _no_runtime() -> str | None:
    """Loads the SYCL runtime, unless the process has one; why that cannot be. Asked once."""
    global _WHY
    if _WHY is None:
        _WHY = _load_runtime()
    return _WHY or None


_WHY: str | None = None  # "" once it is loaded


def _load_runtime() -> str:
    if importlib.util.find_spec("vit._sycl") is None:
        return ""  # not built: the base class knows why
    # By name first: a runtime that torch or the user's environment has brought is the one to share.
    for file in (LIBRARY, *map(str, _installed())):
        try:
            ctypes.CDLL(file)
            return ""
        except OSError:
            continue
    return f"the SYCL runtime ({LIBRARY}) is not installed: pip install 'vit-kernels[sycl]'"


def _installed() -> Iterator[Path]:
    """Where the intel-sycl-rt wheel may have put the library: it lies outside of site-packages."""
    try:
        files = distribution("intel-sycl-rt").files or []
        yield from (Path(str(file.locate())) for file in files if file.name == LIBRARY)
    except PackageNotFoundError:
        pass
    yield Path(sys.prefix, "lib", LIBRARY)


def _foreign_runtime() -> str | None:
    """Why torch's SYCL queues cannot be used: torch and these kernels must share one copy of the runtime."""
    loaded = _mapped_runtimes()
    if len(loaded) == 1 and hasattr(torch.xpu.Stream, "sycl_queue"):
        return None
    return (
        f"tensors on xpu need torch and vit to use one SYCL runtime with {LIBRARY}, this process has "
        f"{', '.join(sorted(loaded)) or 'none'} with torch {torch.__version__}; install the torch for XPU that "
        "requires intel-sycl-rt 2026, or keep the tensors on the CPU"
    )


def _mapped_runtimes() -> set[str]:
    """The files of libsycl this process has loaded."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split()[-1] for line in maps if "/libsycl.so" in line}
    return {str(Path(path).resolve()) for path in paths}


def _compiler_log() -> str:
    """What SYCL's run-time compiler said when it last failed, in full; "" when it never did."""
    if "vit._sycl" not in sys.modules:
        return ""
    return _function("vit_sycl_log", ctypes.c_char_p)().decode(errors="replace")


BACKEND = Sycl()
