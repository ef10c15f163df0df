"""Checks and measures the CUDA backend on the GPU of this machine, from the root of the checkout:

    python -m benchmarks.gpu --part ops --out gpu.json

Parts, each within --seconds (default 450): what does not fit is listed as not run, and --only takes it up later.

    parity     the case list on every path of the kernels; determinism, batch invariance, graphs, streams
    ops        copy and matmul ceilings; linear, attention, layer_norm and gelu against PyTorch's own
    model      ViT inference, training and batch-1 latency against eager and torch.compile, all in bfloat16
    train      a short training on digits with --backend cuda and with cpu: the accuracies, side by side
    sanitizer  compute-sanitizer memcheck and racecheck over a sample of the case list

Candidates run in turn, round after round, on random data and on enough buffers to leave the L2 cache; a figure is
the median over rounds. Forwards of ops are timed as replays of a CUDA graph, which leaves out the time of their
launches. Every figure is in the file given to --out as soon as it is known; the file keeps the other parts it has.

From a checkout to figures, on a machine without a network and perhaps without git, one command builds, runs all parts
in the order of what is least certain, and goes on where it stopped:

    python3 -m benchmarks.gpu.steps --minutes 9 --commit HASH --out benchmarks/results/h200/DATE.json
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vit
from vit.backends import get

from . import timing
from .models import part_model, part_train
from .ops import part_ops
from .parity import ROOT, part_parity, part_sanitizer
from .report import Report

PARTS: dict[str, Callable[[Report], None]] = {
    "ops": part_ops,
    "model": part_model,
    "train": part_train,
    "sanitizer": part_sanitizer,
}


#: The exit code of a part that an error has ended; 1 is that of wrong results.
CRASHED = 3


def head() -> str:
    """The commit that is checked out, "unknown" without git."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:
        return "unknown"


def environment(commit: str | None) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or head() or "unknown",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "path": timing.chosen(),
        "vit": vit.backends()[timing.BACKEND],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=("parity", *PARTS), required=True)
    parser.add_argument("--out", type=Path, help="JSON file that gets the figures of the part")
    parser.add_argument("--seconds", type=float, default=450, help="when to stop (default: %(default)s)")
    parser.add_argument("--only", metavar="REGEX", help="only what matches")
    parser.add_argument("--commit", help="what is measured, where git cannot say (default: git rev-parse HEAD)")
    parser.add_argument("--every", type=int, default=1, help="parity: every n-th case (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="parity: starting with this one (default: %(default)s)")
    parser.add_argument(
        "--path",
        choices=tuple(timing.PATHS),
        default="automatic",
        help="kernels that may run: no_wgmma where Hopper's own are in doubt (default: %(default)s)",
    )
    args = parser.parse_args()
    if why := get(timing.BACKEND).unavailable():
        print(f"benchmarks.gpu: backend '{timing.BACKEND}' cannot be used: {why}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    timing.choose(args.path)
    report = Report(args.part, args.seconds, args.only, args.out, environment(args.commit))
    try:
        if args.part == "parity":
            part_parity(report, args.every, args.first)
        else:
            PARTS[args.part](report)
    except Exception as error:  # a fault of the GPU, most likely: nothing after it would mean anything
        traceback.print_exc()
        report.fail("crash", f"{type(error).__name__}: {str(error)[:300]}")
        return CRASHED
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
