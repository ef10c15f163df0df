"""Compiles csrc/cuda with a C++ compiler and the emulator in this folder: a backend on CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch
from vit.backends import NativeBackend
from vit.backends.cuda import tf32_allowed
from vit.ops import OPS, ROUTINES
from vit.ops import bound as glue
from vit.ops.routine import NativeRoutine

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
NAME = "_cuda_emulator"

#: The numbers of vit_cuda_set_path (csrc/cuda/runtime.cuh).
PATHS = {"automatic": 0, "portable": 1, "no_wgmma": 2, "no_overlap": 3, "wgmma_backward": 4}


def compiler() -> str | None:
    """The C++ compiler, None when there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path, sanitize: bool = False) -> Path:
    """The module, compiled into a folder named by the content of its sources unless it is already there.

    `sanitize`: with AddressSanitizer and UndefinedBehaviorSanitizer, to be loaded as `sanitizer_environment` says.
    """
    sources = [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "bindings.cpp", CSRC / "check.cpp", HERE / "emulator.cpp"]
    headers = [*CSRC.glob("*.h"), *CSRC.glob("*.def"), *CSRC.glob("cuda/*.cuh"), *HERE.glob("*.cuh")]
    content = b"".join(file.read_bytes() for file in [*sources, *sorted(headers)])
    digest = hashlib.sha256(content).hexdigest()[:16] + ("-sanitized" if sanitize else "")
    module = folder / digest / f"{NAME}.so"
    if module.exists():
        return module
    work = folder / f"{digest}-{os.getpid()}"
    work.mkdir(parents=True)
    command = [compiler() or "g++", "-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden"]
    command += ["-Wno-unknown-pragmas", f"-DVIT_MODULE={NAME}", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
    command += ['-DVIT_CUDA_ARCHITECTURES="emulated"', '-DVIT_CUDA_COMPILER="emulated"', "-DVIT_CUDA_WITH_HOPPER=1"]
    command += [
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
        "-include",
        str(HERE / "hopper_instructions.cuh"),
    ]

    if sanitize:
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]

    def compile_one(source: Path) -> Path:
        target = work / f"{source.name}.o"
        run([*command, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    link = ["-fsanitize=address,undefined"] if sanitize else []
    run([command[0], "-shared", *link, *map(str, objects), "-o", str(work / module.name)])
    module.parent.mkdir(exist_ok=True)
    os.replace(work / module.name, module)  # another process may have been as quick
    shutil.rmtree(work)
    return module


def sanitizer_environment() -> dict[str, str] | None:
    """The environment of a Python process that loads a sanitized module, None where the compiler has no sanitizer."""
    # libstdc++ too, or ASan cannot follow C++ exceptions
    libraries = [
        run([compiler() or "g++", f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so")
    ]
    if not Path(libraries[0]).is_absolute():
        return None
    # The interpreter's own leaks are not ours; the stacks of emulated threads come and go without ASan's knowledge.
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return dict(os.environ) | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options}


def run(command: list[str]) -> str:
    """Standard output of a command; its error text in the exception when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def load(path: Path) -> ModuleType:
    """The compiled module."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests compile the emulator: kept between runs, unless pytest is to keep nothing (-p no:cacheprovider)."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("cuda_emulator") if cache else tmp_path_factory.mktemp("cuda_emulator")


@contextmanager
def registered(path: Path, name: str = "cuda_emulator", kind: type[Emulated] | None = None) -> Iterator[Emulated]:
    """A backend from a compiled module, known to vit while the context lasts; a name serves once in a process."""
    record = (kind or Emulated)(path, name)
    backends = importlib.import_module("vit.backends")
    backends._RECORDS[record.name] = record
    bound = {op.name: glue.NativeOp(op, record.name) for op in OPS.values()}
    bound |= {routine.name: NativeRoutine(routine, record.name) for routine in ROUTINES.values()}
    for op, callable in bound.items():
        glue._BOUND[op, record.name] = callable
    yield record
    for op in bound:
        del glue._BOUND[op, record.name]
    del backends._RECORDS[record.name]


class Emulated(NativeBackend):
    """The CUDA kernels on CPU tensors, as one of the emulated GPUs (instructions.cuh): at first device 0, a Hopper."""

    device_types = ("cpu",)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.module = load(path)
        self.exported = ctypes.CDLL(str(path))
        self.device = 0

    def unavailable(self) -> str | None:
        return None

    def load(self) -> Any:
        return self.module

    def context(self, device: torch.device) -> tuple[int, int, int, bool]:
        return 0, self.device, 1, tf32_allowed()

    def workspace(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return torch.full((nbytes,), 255, dtype=torch.uint8)  # NaN: nothing may be read that was not written

    def capture(self, on: bool) -> None:
        """Begins or ends a capture: launches are kept, and not run."""
        self.exported.vit_emulator_capture(on)

    def refused(self) -> str:
        """What the last capture refused: names of functions of the runtime."""
        self.exported.vit_emulator_refused.restype = ctypes.c_char_p
        return self.exported.vit_emulator_refused().decode()

    def kept(self) -> int:
        """How many launches are kept, of all captures."""
        return self.exported.vit_emulator_kept()

    def replay(self, first: int, last: int) -> None:
        """Runs some of them."""
        self.exported.vit_emulator_replay.restype = ctypes.c_char_p
        if wrong := self.exported.vit_emulator_replay(first, last):
            raise RuntimeError(wrong.decode())

    def use(self, path: str) -> None:
        """Which kernels may run, a name of PATHS."""
        self.exported.vit_cuda_set_path(PATHS[path])
