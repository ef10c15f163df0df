"""SIGKILL at random moments of a run, and the same command again, until it ends: its bits are the uninterrupted run's.

`python tests/training_kills.py --kills 20` does it in each mode, six minutes each; test_training_resume.py kills a
plain run.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml
from training_helpers import SMALL, same_bits

#: What differs from SMALL.
MODES = {
    "plain": {},
    "mixup, ema, workers": {"mixup": 0.8, "ema": 0.99, "workers": 1},
    "adamw8bit, accumulate": {"optimizer": "adamw8bit", "accumulate": 2, "batch_size": 64},
}


def phase(run: Path) -> str:
    """What a kill has found, by the files it left."""
    if not (run / ".lock").exists():
        return "before the run folder" if not run.exists() else "start-up"
    if list(run.glob(".*.tmp*")) or [path for path in run.glob(".*") if path.name != ".lock"]:
        return "while a file was written"
    return "after a checkpoint" if (run / "checkpoint.safetensors").exists() else "before the first checkpoint"


def kill_and_resume(mode: str, kills: int, seed: int, folder: Path) -> Counter[str]:
    """Kills so often, at moments uniform over an uninterrupted process's time; a run that ended is compared, and the
    next one begun. Returns how many kills found what."""
    recipe, whole = folder / "recipe.yaml", folder / "whole"
    recipe.write_text(yaml.safe_dump(vars(SMALL) | {"checkpoint_seconds": 0.0} | MODES[mode]))
    rng, found, out = random.Random(seed), Counter[str](), folder / "run"

    def command(out: Path) -> list[str]:
        words = ["train", "--config", str(recipe), "--out", str(out), "--resume", "auto"]
        return [sys.executable, "-m", "vit", *words]

    def go(out: Path, seconds: float | None) -> bool:
        """Whether the process ended by itself. Its output goes to a file: workers hold a pipe for seconds longer."""
        with (folder / "output").open("w") as output:
            process = subprocess.Popen(command(out), stdout=output, stderr=output)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return False
        assert code == 0, (folder / "output").read_text()
        return True

    start = time.monotonic()
    go(whole, None)
    duration = time.monotonic() - start
    while found.total() < kills:
        if go(out, rng.uniform(0.0, duration)):
            same_bits(whole, out)
            shutil.rmtree(out)
        else:
            found[phase(out)] += 1
    go(out, None)
    same_bits(whole, out)
    assert not list(out.glob(".*"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, action="append")
    args = parser.parse_args()
    for mode in args.mode or MODES:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = kill_and_resume(mode, args.kills, args.seed, Path(folder))
        print(f"{mode}: {args.kills} kills, same bits, {time.monotonic() - start:.0f} s; {dict(found)}", flush=True)


if __name__ == "__main__":
    main()
