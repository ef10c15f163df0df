"""The C API of the engine under AddressSanitizer and UndefinedBehaviorSanitizer: builds and runs engine.cpp."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

NAME = "c-api"
HERE = Path(__file__).parent
CASES = 2000  # in `pytest -m fuzz`
BATCH = 1000
MOST_MIB = 1024  # of the whole process, sanitizers included

#: What AddressSanitizer says before it ends a process above that.
_BLOW_UP = "hard rss limit exhausted"


def build(folder: Path) -> Path:
    """The program engine_fuzz, with sanitizers."""
    warnings = "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"
    for command in (
        ["-S", HERE, "-B", folder, "-G", "Ninja", "-DVIT_SANITIZE=ON", warnings],
        ["--build", folder, "--target", "engine_fuzz"],
    ):
        done = subprocess.run(["cmake", *map(str, command)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])
    return folder / "engine_fuzz"


def fuzz(work: Path, out: Path, seed: int, minutes: float | None = None) -> tuple[bool, str]:
    """Whether all cases were good, and a text with the figures."""
    work.mkdir(parents=True, exist_ok=True)
    program = build(work / "build")
    total: Counter[str] = Counter()
    lines: list[str] = []
    first, end = 0, time.monotonic() + 60 * (minutes or 0)
    while time.monotonic() < end if minutes else first < CASES:
        done = run(program, work, seed, first, BATCH)
        figures = done.stdout.rstrip().rpartition("\n")[2]
        if done.returncode in (0, 3) and figures.startswith("{"):
            found = json.loads(figures)
            total["peak MiB"] = max(total["peak MiB"], found.pop("peak_mib"))
            total.update(found)
            lines += [line for line in done.stdout.splitlines() if line.startswith("wrong")]
            first += BATCH
            continue
        if not (work / "case").exists():
            raise RuntimeError(f"engine_fuzz did not begin: {done.stdout}{done.stderr}")
        case = int((work / "case").read_text())
        kind = "hang" if done.returncode == -signal.SIGPROF else "blow-up" if _BLOW_UP in done.stderr else "died"
        total[kind] += 1
        kept = out / f"{NAME}-{seed}-{case}"
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(work / "input.vit", kept / "input.vit")
        (kept / "stderr.txt").write_text(done.stderr)
        reason = next((line for line in done.stderr.splitlines() if "error" in line.lower()), str(done.returncode))
        lines.append(f"{NAME} {case}: {kind}: {reason}\n  engine_fuzz FOLDER {seed} {case} 1    ({kept})")
        first = case + 1
        if len(lines) > 20:
            break
    good = not any(total[kind] for kind in ("wrong", "hang", "blow-up", "died"))
    return good, "\n".join([", ".join(f"{key} {value}" for key, value in total.items()), *lines])


def run(program: Path, work: Path, seed: int, first: int, count: int) -> subprocess.CompletedProcess[str]:
    options = f"hard_rss_limit_mb={MOST_MIB}:detect_stack_use_after_return=0"
    environment = os.environ | {"ASAN_OPTIONS": options, "OMP_NUM_THREADS": "2"}
    environment.pop("VIT_CPU_ISA", None)  # of the module under test; this program is built for one level
    words = [str(program), str(work), str(seed), str(first), str(count)]
    return subprocess.run(words, capture_output=True, text=True, errors="replace", env=environment, timeout=1800)
