"""Kernels on the CPU built with sanitizers, over the case list.

C++ with AddressSanitizer and UndefinedBehaviorSanitizer; Mojo, whose compiler has no second one, with the first.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vit
from conftest import USABLE
from mojo_compiler import mojo
from vit.parity import cases

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("odd", "corner")


def sanitized_package(folder: Path, backend: str) -> Path:
    """A copy of the package whose one module is built with -DVIT_SANITIZE=ON; the folder for PYTHONPATH."""
    package = folder / "package" / "vit"
    source = Path(vit.__file__).parent
    shutil.copytree(
        source, package, ignore=shutil.ignore_patterns("_cpu*.so", "_cuda*.so", "_mojo*.so", "_sycl*.so", "__pycache__")
    )
    build = ["cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja", f"-DVIT_BACKEND={backend}"]
    build += ["-DVIT_SANITIZE=ON"]
    build += ["-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    # The level that runs here: kernels with sanitizers compile for a quarter of an hour otherwise (2 cores of a Zen 3).
    build += [f"-DVIT_SANITIZE_LEVELS={vit.backends()[backend]['isa']}"]
    if backend == "mojo":
        build += [f"-DVIT_MOJO={mojo()}"]
    for command in (
        build,
        ["cmake", "--build", folder / "build"],
        ["cmake", "--install", folder / "build", "--prefix", package],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return package.parent


pytestmark = [
    pytest.mark.sanitizer,
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="needs a backend on Linux"),
]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The environment of a process that uses a backend with sanitizers; each is built once."""

    @functools.cache
    def environment(backend: str) -> dict[str, str]:
        runtime = [
            subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
            for name in ("libasan.so", "libstdc++.so")  # the second, or ASan cannot follow C++ exceptions
        ]
        if backend not in USABLE:
            pytest.skip(f"the {backend} backend is not usable here")
        if not Path(runtime[0]).is_absolute():
            pytest.skip("the compiler has no AddressSanitizer library")
        if backend == "mojo" and mojo() is None:
            pytest.skip("no Mojo compiler")
        return os.environ | {
            "PYTHONPATH": str(sanitized_package(tmp_path_factory.mktemp("sanitized"), backend)),
            "LD_PRELOAD": " ".join(runtime),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # the interpreter's own leaks are not ours
        }

    return environment


@pytest.mark.parametrize("name", ["cpu", "mojo"])
def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path, sanitized, name):
    report = tmp_path / "parity.json"
    options = [word for group in GROUPS for word in ("--group", group)]
    done = subprocess.run(
        [sys.executable, "-m", "vit", "parity", "--backend", name, "--json", str(report), *options],
        env=sanitized(name), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert json.loads(report.read_text())["passed"] == len(cases("cpu", groups=GROUPS))


def test_the_engine_neither(sanitized):
    """Every option, output and bad input of test_engine.py; whole models would take too long."""
    chosen = "not every_name and not direction and not level and not profile"
    tests = [str(ROOT / "tests/engine/test_engine.py"), "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *tests],
        env=sanitized("cpu"), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
