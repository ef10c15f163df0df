"""Compiles probe.cu with nvcc and runs Hopper's instructions one at a time:

    python -m benchmarks.gpu.probe --out gpu.json

Each probe is a process of its own, so that one that hangs or faults says so and costs no other. The exit code is 1 when
a GPU does not do what the kernels assume, 2 when the probes cannot be compiled.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .report import Report

ROOT = Path(__file__).parents[2]

#: A probe takes 1 s, most of it the start of the driver.
SECONDS_EACH = 10


def compile_probes(program: Path) -> str:
    """Writes the program; returns what the compiler says when it cannot."""
    sys.path.append(str(ROOT / "build_backend"))
    import native

    nvcc = native.find_nvcc()
    if nvcc is None:
        return "no nvcc in CUDACXX, PATH or /usr/local/cuda"
    command = [str(nvcc), "-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}"]
    command += ["--generate-code=arch=compute_90a,code=[sm_90a]", f"-L{nvcc.resolve().parent.parent / 'lib'}"]
    command += [str(Path(__file__).with_suffix(".cu")), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout + done.stderr)[-1000:] if done.returncode != 0 else ""


def run_probes(program: Path, report: Report) -> None:
    names = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        if not report.wanted(name):
            continue
        start = time.monotonic()
        try:
            done = subprocess.run([str(program), name], capture_output=True, text=True, timeout=SECONDS_EACH)
        except subprocess.TimeoutExpired:
            report.fail(name, f"hangs: ended after {SECONDS_EACH} s")
            continue
        if done.returncode == 0:
            report.add(name, ok=True, seconds=time.monotonic() - start)
        else:
            report.fail(name, f"exit code {done.returncode}: {(done.stdout + done.stderr).strip()[:500]}")


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.gpu.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help='JSON file that gets what was found, under "probe"')
    parser.add_argument("--seconds", type=float, default=60, help="when to stop (default: %(default)s)")
    parser.add_argument("--commit", help="what is probed, where git cannot say")
    args = parser.parse_args()
    report = Report("probe", args.seconds, None, args.out, {"commit": args.commit})
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        if why := compile_probes(program):
            report.add("compile", not_run=why)
            return 2
        run_probes(program, report)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
