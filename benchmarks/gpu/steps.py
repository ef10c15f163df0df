"""One command for a GPU that is at hand for minutes, from the root of a checkout, with nothing installed:

    python3 -m benchmarks.gpu.steps --minutes 9 --commit HASH --out benchmarks/results/h200/DATE.json

It builds the cpu and cuda backends into python/vit, tries Hopper's instructions one at a time (probe.cu), then runs the
parts of benchmarks.gpu, what is least certain and matters most first. Where a probe fails, or a first step on the
fastest kernels crashes or hangs, the steps after it do without wgmma (--path no_wgmma). Every step is a process of its
own with a limit: a kernel that faults or hangs costs its own step, and the next one begins. What came of each is under
"steps" in the file; a step that is there is not run again, so the same command goes on where the last one stopped, on
another machine too. The exit code is 1 when a step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD = "import native, pathlib; native.build(pathlib.Path('python/vit'), pathlib.Path('build/gpu').absolute())"
#: On a fresh machine the first import of torch can take a minute, which is no step's fault.
START = "import torch; print(torch.__version__, torch.zeros(1, device='cuda').device, torch.cuda.get_device_name())"


@dataclass(frozen=True)
class Step:
    """A run of one part, for at most so many seconds."""

    name: str
    seconds: int
    arguments: tuple[str, ...]
    module: str = "benchmarks.gpu"


#: A kernel that no GPU has run and nothing else depends on: a fault of it costs its own steps.
NEWEST = ("--path", "wgmma_backward")

#: 9 minutes hold the first six and the build; 29 minutes hold all.
STEPS = (
    Step("probe", 30, (), "benchmarks.gpu.probe"),
    Step(
        "promises", 30, ("--part", "parity", "--only", "^(deterministic|batch_invariant|same_in|on_another|on_every)")
    ),
    Step("parity of wgmma", 80, ("--part", "parity", "--only", "^(attention|linear|matmul)-.*float16", "--every", "3")),
    Step("ops of B", 130, ("--part", "ops", "--only", "^(copy|matmul|layer_norm|attention .*N=(197|257)|linear B)")),
    Step("latency and training of B", 110, ("--part", "model", "--only", "(latency|training) B")),
    Step("inference of B", 100, ("--part", "model", "--only", "inference B")),
    Step("parity of the wgmma backward", 40, ("--part", "parity", "--only", "^attention-bwd-.*float16", *NEWEST)),
    Step("race of the wgmma backward", 60, ("--part", "ops", "--only", "^attention .*N=(50|197|257)", *NEWEST)),
    Step("parity", 400, ("--part", "parity")),
    Step("sanitizer", 120, ("--part", "sanitizer")),
    Step("other ops", 240, ("--part", "ops", "--only", "^(gelu|attention .*N=(50|577|1025)|linear [SLH])")),
    Step("other models", 180, ("--part", "model", "--only", " [SLH]")),
    Step("train", 100, ("--part", "train")),
)

#: The steps that show whether the fastest kernels can be used at all, with the exit codes that say so: 0, and for
#: parity 1, where some numbers are off but nothing has crashed. A probe that could not be compiled (2) says nothing.
TRUSTED = {"probe": (0, 2), "promises": (0, 1), "parity of wgmma": (0, 1)}

#: What a step gets beyond the time its part knows of: importing torch, and the candidate that is being timed.
GRACE = 20


def run(command: list[str], seconds: float) -> dict[str, Any]:
    """Exit code and seconds of a process; the end of its text when it fails. Ended with all it started when late."""
    start = time.monotonic()
    search = os.pathsep.join([str(ROOT / "python"), str(ROOT / "build_backend"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": search, "PYTHONUNBUFFERED": "1"}
    # Into a file: a pipe ends with the last process that holds it, and those a compiler leaves behind may hold it long.
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
        late = ""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = f"\nended after {seconds:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it a while
                process.wait(10)
        log.seek(0)
        text = log.read() + late
    print(text, flush=True)
    row: dict[str, Any] = {
        "code": -signal.SIGKILL if late else process.returncode,
        "seconds": round(time.monotonic() - start, 1),
    }
    return row if process.returncode == 0 else row | {"tail": text[-1000:]}


def load(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text()) if out.exists() else {}


def keep(out: Path, name: str, row: dict[str, Any]) -> None:
    """Adds a row to what the parts have written meanwhile."""
    content = load(out)
    content.setdefault("steps", {})[name] = row
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = out.with_name(f".{out.name}.steps")  # what vit.support.files does, which this process cannot import
    whole.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(whole, out)
    print(f"==== {name}: {row}", flush=True)


def path(content: dict[str, Any]) -> str:
    """Which kernels the next step may use, by what the file says about the steps before."""
    steps = content.get("steps", {})
    doubtful = any(name in steps and steps[name]["code"] not in codes for name, codes in TRUSTED.items())
    return "no_wgmma" if doubtful else "automatic"


def built() -> bool:
    return any((ROOT / "python/vit").glob("_cuda*.so"))


def run_steps(out: Path, minutes: float, commit: str | None = None) -> int:
    """Builds where nothing is built yet, then runs the steps that the file lacks and the time allows."""
    end = time.monotonic() + 60 * minutes
    row = run([sys.executable, "-c", START], 60 * minutes)
    keep(out, "start", row)
    if row["code"] != 0:
        return 1
    if not built():
        os.environ.setdefault("VIT_BACKENDS", "cpu,cuda")
        keep(out, "build", run([sys.executable, "-c", BUILD], end - time.monotonic()))
    ready = built()  # without the cpu backend only the comparison of trainings is lost
    failed = not ready
    for step in STEPS:
        if not ready and step.module == Step.module:  # what is left are the probes, which need a compiler alone
            continue
        left = end - time.monotonic()
        if step.name in load(out).get("steps", {}) or left < step.seconds / 2 + GRACE:
            continue
        doubtful = step.module == Step.module and path(load(out)) != "automatic"
        if doubtful and "--path" in step.arguments:
            continue
        seconds = min(step.seconds, left - GRACE)
        command = [sys.executable, "-m", step.module, *step.arguments, "--out", str(out.absolute())]
        command += ["--seconds", f"{seconds:.0f}", *(["--commit", commit] if commit else [])]
        if doubtful:
            command += ["--path", path(load(out))]
        row = run(command, seconds + GRACE)
        keep(out, step.name, row)
        failed |= row["code"] != 0
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.gpu.steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file that gets all figures")
    parser.add_argument("--minutes", type=float, default=9, help="when to stop (default: %(default)s)")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    args = parser.parse_args()
    return run_steps(args.out, args.minutes, args.commit)


if __name__ == "__main__":
    sys.exit(main())
