"""The CUDA backend as nvcc compiles it, run without a GPU: its PTX interpreted, its host code as it is.

`build` makes the module, with a CUDA runtime of its own (runtime.cpp) that hands every launch to Python, and keeps the
PTX of every file; `backend` makes it a backend on CPU tensors, as tests/cuda_emulator does with its own, so that the
project's case list runs on it unchanged. What it sees, and what it cannot: docs/kernels/cuda.md.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cuda_emulator
import pybind11
import torch
from cuda_emulator import CSRC, NAME, Emulated, run

from .machine import Machine
from .memory import HostMemory
from .parse import Module, PtxError, parse_module
from .program import Program

HERE = Path(__file__).parent
#: The emulated GPUs, by their numbers in runtime.cpp.
DEVICES = {"9.0": 0, "8.0": 1, "8.6": 2, "12.0": 3, "8.9": 4}
#: Of each of them: few, so that a block has several tiles.
MULTIPROCESSORS = 3


def nvcc() -> str | None:
    """CUDA's compiler, where build_backend/native.py looks for it; None when there is none."""
    wheels = [f"{folder}/nvidia/cu13/bin/nvcc" for folder in sys.path]
    candidates = [os.environ.get("CUDACXX", "nvcc"), "/usr/local/cuda/bin/nvcc", *wheels]
    return next(filter(None, map(shutil.which, candidates)), None)


def build(folder: Path) -> Path:
    """Compiles into a folder named by the content of the sources, unless it is there; half a minute on two cores."""
    devices = sorted(CSRC.glob("cuda/*.cu"), key=lambda file: -file.stat().st_size)
    hosts = [CSRC / "bindings.cpp", CSRC / "check.cpp"]
    headers = [*CSRC.glob("*.h"), *CSRC.glob("*.def"), *CSRC.glob("cuda/*.cuh")]
    content = b"".join(file.read_bytes() for file in sorted([*devices, *hosts, *headers, HERE / "runtime.cpp"]))
    target = folder / hashlib.sha256(content).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # a second process waits for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            work = folder / f"{target.name}-{os.getpid()}"
            work.mkdir()
            compile_all(devices, hosts, work)
            work.rename(target)
    return target


def compile_all(devices: list[Path], hosts: list[Path], work: Path) -> None:
    """The module and, for every file with kernels, its PTX."""
    compiler = nvcc() or "nvcc"
    common = ["-std=c++17", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]

    def compile_device(file: Path) -> None:
        architecture = "90a" if file.stem.endswith("_hopper") else "89" if file.stem.endswith("_fp8") else "80"
        kept = work / file.stem
        kept.mkdir()
        command = [compiler, *common, "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--keep"]
        command += [f"--keep-dir={kept}", f"--generate-code=arch=compute_{architecture},code=compute_{architecture}"]
        command += ['-DVIT_CUDA_ARCHITECTURES="emulated"', '-DVIT_CUDA_COMPILER="nvcc"', "-DVIT_CUDA_WITH_HOPPER=1"]
        run([*command, "-c", str(file), "-o", str(work / f"{file.stem}.o")])
        (ptx,) = kept.glob("*.ptx")
        shutil.copy(ptx, work / f"{file.stem}.ptx")
        shutil.rmtree(kept)

    def compile_host(file: Path) -> None:
        command = [cuda_emulator.compiler() or "g++", *common, "-O1", "-fPIC", "-fvisibility=hidden"]
        command += [f"-DVIT_MODULE={NAME}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        run([*command, "-c", str(file), "-o", str(work / f"{file.stem}_host.o")])

    def compile_runtime() -> None:  # by nvcc, which knows where cuda.h is
        options = ["-O1", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        run([compiler, *common, *options, "-c", str(HERE / "runtime.cpp"), "-o", str(work / "runtime_host.o")])

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        jobs = [pool.submit(compile_device, file) for file in devices]
        jobs += [*(pool.submit(compile_host, file) for file in hosts), pool.submit(compile_runtime)]
        for job in jobs:
            job.result()
    link = [cuda_emulator.compiler() or "g++", "-shared", "-Wl,-Bsymbolic", "-o", str(work / f"{NAME}.so")]
    run([*link, *map(str, sorted(work.glob("*.o")))])


@dataclass
class Launches:
    """What the launches of a module are run with, and what came of them."""

    folder: Path
    seed: int | None = None  # as of Machine
    lanes: int = 4096  # threads at once
    memory: HostMemory = field(default_factory=HostMemory)
    modules: dict[str, Module] = field(default_factory=dict)  # by file
    files: dict[str, str] = field(default_factory=dict)  # kernel -> file
    programs: dict[str, Program] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    done: dict[str, list[float]] = field(default_factory=dict)  # kernel -> launches, seconds, instructions
    overlapped: set[str] = field(default_factory=set)  # kernels that could begin before the one in front had ended
    capturing: bool = False  # launches are kept, and not run
    kept: list[tuple[str, int, int, int, int, int, bytes]] = field(default_factory=list)  # as `execute` takes them

    def __post_init__(self) -> None:
        for path in sorted(self.folder.glob("*.ptx")):
            module = self.modules[path.stem] = parse_module(path.read_text())
            for name in module.functions:
                self.files.setdefault(name, path.stem)

    def program(self, name: str) -> Program:
        """A kernel, translated when it is first launched."""
        if name not in self.programs:
            self.programs[name] = Program(self.modules[self.files[name]], name)
        return self.programs[name]

    def launch(
        self, name: bytes, grid: int, threads: int, shared: int, cluster: int, overlaps: int, arguments: Any
    ) -> int:
        """Called by cudaLaunchKernelExC; not 0 for a failure, whose text is in `errors`."""
        kernel = name.decode()
        try:
            program = self.program(kernel)
            params = bytearray(program.param_bytes)
            for i, (param, size, _) in enumerate(program.entry.params):
                at = program.param_offsets[param]
                params[at : at + size] = ctypes.string_at(arguments[i], size)
            how = (kernel, grid, threads, shared, cluster, overlaps, bytes(params))
            if self.capturing:
                self.kept.append(how)
            else:
                self.execute(*how)
            return 0
        except PtxError as error:
            self.errors.append(f"{kernel}\n{error}")
        except Exception:  # Python would only print it: the caller is C
            self.errors.append(traceback.format_exc())
        return 1

    def execute(
        self, kernel: str, grid: int, threads: int, shared: int, cluster: int, overlaps: int, params: bytes
    ) -> None:
        """Runs a kernel."""
        if overlaps:
            self.overlapped.add(kernel)
        machine, start = Machine(self.program(kernel), self.memory, self.seed), time.monotonic()
        machine.launch(grid, threads, shared, cluster, params, self.lanes, bool(overlaps))
        row = self.done.setdefault(kernel, [0, 0.0, 0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + time.monotonic() - start, row[2] + machine.executed

    def fresh(self) -> None:
        """Forgets the tensors and errors of the call before."""
        self.memory.clear()
        self.errors.clear()

    def allow(self, tensor: torch.Tensor) -> None:
        """From here on kernels may touch what the tensor spans."""
        if tensor.numel() and tensor.device.type == "cpu":
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            self.memory.allow(_data_ptr(tensor), (last + 1) * tensor.element_size())


_data_ptr = torch.Tensor.data_ptr


class Interpreted(Emulated):
    """The backend, with captures that keep launches here."""

    launches: Launches

    def capture(self, on: bool) -> None:
        super().capture(on)
        self.launches.capturing = on

    def kept(self) -> int:
        return len(self.launches.kept)

    def replay(self, first: int, last: int) -> None:
        for how in self.launches.kept[first:last]:
            self.launches.execute(*how)


@contextmanager
def backend(folder: Path, **options: Any) -> Iterator[tuple[Emulated, Launches]]:
    """The backend "ptx_emulator", known to vit while the context lasts, and its launches.

    A tensor whose address is asked for, as the launchers of the ops do, may be touched by kernels.
    """
    launches = Launches(folder, **options)

    def data_ptr(tensor: torch.Tensor) -> int:
        launches.allow(tensor)
        return _data_ptr(tensor)

    kind = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int,
        ctypes.POINTER(ctypes.c_void_p),
    )  # fmt: skip
    callback = kind(launches.launch)
    with cuda_emulator.registered(folder / f"{NAME}.so", "ptx_emulator", Interpreted) as record:
        record.launches = launches
        record.exported.vit_stub_set(callback, MULTIPROCESSORS)
        torch.Tensor.data_ptr = data_ptr
        try:
            yield record, launches
        finally:
            del torch.Tensor.data_ptr  # the one of its base again
            record.exported.vit_stub_set(kind(), MULTIPROCESSORS)
