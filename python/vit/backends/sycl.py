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

from ._base import DTYPE_CODES, HostWorkspace, NativeBackend, Spec, constant
from ._host_memory import MEMORY

#: The library of every 2026 release of the runtime: the compiled module needs one of this name.
LIBRARY = "libsycl.so.9"


class Sycl(NativeBackend):
    name = "sycl"
    priority = 10  # below cpu: for tensors on the CPU these kernels are the second choice
    device_types = ("cpu", "xpu")
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    _workspace = HostWorkspace()
    #: Where large results on the CPU live.
    memory = MEMORY

    def unavailable(self) -> str | None:
        return _no_runtime() or super().unavailable()

    @property
    def lib(self) -> Any:
        _no_runtime()  # before the module that needs it is imported
        return super().lib

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

    def workspace(self, nbytes: int, device: torch.device) -> torch.Tensor:
        if device.type == "xpu":
            return super().workspace(nbytes, device)
        return self._workspace.take(nbytes)

    moves = True

    def move(
        self,
        shape: Sequence[int],
        a: torch.Tensor | None,
        lead: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
        terms: int = 1,
        term: int = 0,
    ) -> torch.Tensor:
        given = next(t for t in (a, lead, b) if t is not None)
        return self._move(self.empty(shape, given.dtype, given.device), a, lead, b, terms, term)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self._move(self.empty(shape, dtype, device), None, None, None, 1, 0)

    def _move(
        self,
        out: torch.Tensor,
        a: torch.Tensor | None,
        lead: torch.Tensor | None,
        b: torch.Tensor | None,
        terms: int,
        term: int,
    ) -> torch.Tensor:
        fields = _Move()
        fields.a, fields.lead, fields.b, fields.out = (0 if t is None else t.data_ptr() for t in (a, lead, b, out))
        fields.n[:], fields.columns = _padded(out.shape[:-1], 1), out.shape[-1]
        if lead is not None:
            fields.leads, fields.lead_batch = lead.shape[1], lead.stride(0)
        fields.terms, fields.term = terms, term
        for strides, view in ((fields.a_strides, a), (fields.b_strides, b)):
            strides[:] = [0] * 5 if view is None else _padded(view.stride()[:-1], 0)
        fields.dtype, fields.stream = DTYPE_CODES[out.dtype], self.context(out.device)[0]
        if error := _function("vit_sycl_move", ctypes.c_char_p)(ctypes.byref(fields)):
            raise RuntimeError(error.decode(errors="replace"))
        return out

    def info(self) -> dict[str, Any]:
        record = super().info()  # compiles, the first time
        with contextlib.suppress(PackageNotFoundError):  # oneAPI's own, not a wheel
            record["runtime version"] = version("intel-sycl-rt")
        log = _compiler_log()
        return record | ({"compiler log": log} if log else {})


class _Move(ctypes.Structure):
    """vit::device::Move of csrc/sycl/move.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "lead", "b", "out")),
        ("n", ctypes.c_int64 * 5),
        *((name, ctypes.c_int64) for name in ("columns", "leads", "lead_batch", "terms", "term")),
        ("a_strides", ctypes.c_int64 * 5),
        ("b_strides", ctypes.c_int64 * 5),
        ("dtype", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
    )


def _padded(sizes: Sequence[int], fill: int) -> list[int]:
    """The outer sizes or strides of up to five dimensions as five: the new ones follow the second."""
    sizes = [*sizes[:1], *([fill] if len(sizes) == 1 else []), *sizes[1:]] if sizes else [fill, fill]
    return [*sizes, *[fill] * (5 - len(sizes))]


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
