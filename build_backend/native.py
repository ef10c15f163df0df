"""Builds the native backends: one CMake configure and build per folder of csrc/, all at the same time.

A backend that VIT_BACKENDS names must build. Without that variable whatever can be built is built, and the
reason for each other one is kept in vit/_build.json for `vit info`: a missing or broken compiler never fails
an install.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORMS = ("x86_64", "aarch64")
#: Exactly this one: minor releases of Mojo deprecate and remove what the kernels are written with.
MOJO_VERSION = "1.2.0"


class BuildError(Exception):
    """A backend named in VIT_BACKENDS cannot be built, or no such backend exists."""


@dataclass
class Record:
    """What became of one backend; the values of vit/_build.json."""

    built: bool
    reason: str | None = None
    compiler: str | None = None
    flags: str | None = None
    architectures: str | None = None
    seconds: float | None = None
    bytes: int | None = None


def backends() -> list[str]:
    """The folders of csrc/ that hold a CMakeLists.txt."""
    return sorted(file.parent.name for file in (ROOT / "csrc").glob("*/CMakeLists.txt"))


def requested() -> list[str] | None:
    """The comma-separated names in VIT_BACKENDS ("reference" builds nothing), or None when it is unset."""
    names = [name.strip() for name in os.environ.get("VIT_BACKENDS", "").split(",") if name.strip()]
    known = [*backends(), "reference"]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BuildError(f"VIT_BACKENDS names {', '.join(unknown)}; this source tree has {', '.join(known)}")
    return names or None


def find_nvcc() -> Path | None:
    """nvcc from CUDACXX, PATH, /usr/local/cuda or the nvidia-cuda-nvcc wheel, in this order."""
    named = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if named or "CUDACXX" in os.environ:
        return Path(named) if named else None
    candidates = [Path("/usr/local/cuda/bin/nvcc"), *(Path(p) / "nvidia/cu13/bin/nvcc" for p in sys.path)]
    return next(filter(Path.is_file, candidates), None)


def find_sycl() -> Path | None:
    """The prefix that holds include/sycl/sycl.hpp: of the intel-sycl-rt wheel or of a oneAPI installation.

    The wheel puts its headers next to lib/, which under pip's build isolation is not sys.prefix.
    """
    candidates = [Path(sys.prefix), *(Path(p).parents[2] for p in sys.path if p.endswith("site-packages"))]
    candidates.append(Path("/opt/intel/oneapi/compiler/latest"))
    return next((p for p in candidates if (p / "include/sycl/sycl.hpp").is_file()), None)


def find_mojo() -> Path | None:
    """The Mojo compiler of MOJO_VERSION: of the mojo-compiler wheel, or on PATH."""
    named = shutil.which("mojo")
    candidates = [Path(p) / "modular/bin/mojo" for p in sys.path] + ([Path(named)] if named else [])
    return next((p for p in candidates if p.is_file() and _mojo_version(p) == MOJO_VERSION), None)


def _mojo_version(compiler: Path) -> str | None:
    """What `mojo --version` says ("Mojo 1.2.0 (2016d0cd)"); None when it does not run."""
    env = os.environ | {"MODULAR_TELEMETRY_ENABLED": "0"}
    try:
        done = subprocess.run([compiler, "--version"], env=env, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    words = done.stdout.split()
    return words[1] if done.returncode == 0 and len(words) > 1 else None


def outputs(package: Path) -> list[Path]:
    """The files that `build` left in a package folder."""
    return sorted(file for name in ["build", *backends()] for file in package.glob(f"_{name}.*"))


def build(target: Path, work: Path) -> dict[str, Record]:
    """Build the wanted backends into the package folder `target` and write its _build.json.

    `work` holds the CMake build folders and one build.log each. Raises BuildError when a named backend fails.
    """
    names, wanted = backends(), requested()
    tried = names if wanted is None else [name for name in names if name in wanted]
    jobs = _max_jobs()  # for each backend: the slow one should not be left with half of the cores
    for stale in outputs(target):  # a module from an earlier build must not outlive a failure of this one
        stale.unlink()
    records = {name: Record(False, "not named in VIT_BACKENDS") for name in names}
    with ThreadPoolExecutor(max_workers=len(tried) or 1) as pool:
        futures = {name: pool.submit(_build_one, name, target, work / name, jobs) for name in tried}
    records |= {name: future.result() for name, future in futures.items()}
    target.mkdir(parents=True, exist_ok=True)
    known = {n: {k: v for k, v in asdict(r).items() if v is not None} for n, r in records.items()}
    text = json.dumps(known, indent=2)
    (target / "_build.json").write_text(text + "\n", encoding="utf-8")
    failed = [f"{name}: {records[name].reason}" for name in tried if not records[name].built]
    if wanted and failed:
        raise BuildError("VIT_BACKENDS names a backend that cannot be built here.\n" + "\n".join(failed))
    return records


def _max_jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    value = os.environ.get("MAX_JOBS", "").strip() or str(cores)
    if not value.isdigit() or int(value) < 1:
        raise BuildError(f"MAX_JOBS is {value!r}; it must be a whole number from 1")
    return int(value)


def _build_one(name: str, target: Path, work: Path, jobs: int) -> Record:
    """Configure, build and install one backend; every failure becomes the reason of the record."""
    start = time.monotonic()
    try:
        arguments, environment = _toolchain(name)
        info = _cmake(name, target, work, jobs, arguments, environment)
    except BuildError as error:
        return Record(False, str(error))
    modules = list(target.glob(f"_{name}.*"))
    return Record(
        built=True,
        seconds=round(time.monotonic() - start, 1),
        bytes=sum(module.stat().st_size for module in modules),
        **info,
    )


def _toolchain(name: str) -> tuple[list[str], dict[str, str]]:
    """CMake arguments and environment variables; raises BuildError when the backend's compiler is absent."""
    if sys.platform != "linux" or platform.machine() not in PLATFORMS:
        found = f"{platform.system()} {platform.machine()}"
        raise BuildError(f"native backends need Linux on {' or '.join(PLATFORMS)}, this is {found}")
    if name == "cuda":
        nvcc = find_nvcc()
        if nvcc is None:
            raise BuildError(
                "no nvcc in CUDACXX, PATH or /usr/local/cuda; install the CUDA toolkit, "
                "or name cuda in VIT_BACKENDS to have its compiler wheels fetched"
            )
        # The wheel's libraries lie in lib, where nvcc's own profile does not look (it names lib64).
        lib = nvcc.resolve().parent.parent / "lib"
        path = os.pathsep.join(filter(None, [str(lib), os.environ.get("LIBRARY_PATH")]))
        return [], {"CUDACXX": str(nvcc), **({"LIBRARY_PATH": path} if lib.is_dir() else {})}
    if name == "sycl":
        root = find_sycl()
        if root is None:
            raise BuildError(
                "no SYCL headers in this environment or /opt/intel/oneapi; "
                "name sycl in VIT_BACKENDS to have them fetched"
            )
        return [f"-DSYCL_ROOT={root}"], {}
    if name == "mojo":
        mojo = find_mojo()
        if mojo is None:
            raise BuildError(
                f"no Mojo {MOJO_VERSION} in this environment or on PATH; "
                "name mojo in VIT_BACKENDS to have its compiler fetched (85 MB)"
            )
        return [f"-DVIT_MOJO={mojo}"], {}
    return [], {}


def _cmake(
    name: str, target: Path, work: Path, jobs: int, arguments: list[str], environment: dict[str, str]
) -> dict[str, str]:
    """Run CMake's configure, build and install steps; return what the build recorded about itself."""
    # Build isolation puts ninja and the headers elsewhere in each run: an old cache is useless.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    scripts = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    cmake, ninja = shutil.which("cmake", path=scripts), shutil.which("ninja", path=scripts)
    if cmake is None or ninja is None:
        raise BuildError("cmake and ninja are needed to build it (pip install cmake ninja)")
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(work), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *("-DCMAKE_BUILD_TYPE=Release", f"-DVIT_BACKEND={name}", f"-DPython_EXECUTABLE={sys.executable}"),
        *arguments,
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    steps = [
        configure,
        [cmake, "--build", str(work), "--parallel", str(jobs)],
        [cmake, "--install", str(work), "--prefix", str(target)],
    ]
    log = work / "build.log"
    for command in steps:
        with log.open("a", encoding="utf-8") as stream:
            print("$", shlex.join(command), file=stream, flush=True)
            env = os.environ | environment
            run = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=env)
        if run.returncode != 0:
            text = log.read_text(encoding="utf-8", errors="replace")
            print(f"---- {name} did not build ----\n{text}", file=sys.stderr, flush=True)
            raise BuildError(summarize(text))
    lines = (work / "build_info.txt").read_text(encoding="utf-8").splitlines()
    return {key: value.strip() for key, _, value in (line.partition("=") for line in lines) if value.strip()}


def summarize(log: str, limit: int = 8) -> str:
    """The lines of a failed log that say why: CMake's error, else the compiler's errors, else the end."""
    if "No CMAKE_CXX_COMPILER could be found" in log:
        return "no C++ compiler found; install g++ or clang, or name one in CXX"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.startswith("CMake Error")), None)
    if first is not None:
        return " ".join(lines[first : first + limit])
    errors = [line for line in lines if re.search(r"\berror\b|undefined reference", line) and len(line) < 400]
    # A compiler that crashed leaves a stack, its frames numbered.
    return "; ".join(errors[:limit] or [line for line in lines if not re.match(r"#?\d+ +0x", line)][-limit:])
