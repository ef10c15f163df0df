"""SIGKILL at random moments of a run, and the same command again, until it ends: its bits are the uninterrupted run's.

`python tests/training_kills.py --kills 20` does it in each mode; training/test_training_kills.py kills each thrice.
The processes are forks of one that has imported everything, so that the kills meet the training and not the imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

import yaml
from training_helpers import SMALL, same_bits
from vit.cli import main as vit

PRELOADED = ["vit.cli.train", "vit.training", "accelerate", "matplotlib.pyplot", "sklearn.datasets", "yaml"]

LONGEST = 120.0  # seconds of a whole run that takes three; a killed process that left another one waiting is found so

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


def train_in_a_process(words: list[str], output: str) -> None:
    """The command. Its output goes to a file: workers hold a pipe for seconds after its death."""
    multiprocessing.set_start_method("fork", force=True)  # of workers: their parent is this process, as it is elsewhere
    with Path(output).open("w") as sys.stdout, redirect_stderr(sys.stdout):
        sys.exit(vit(words))


def kill_and_resume(mode: str, kills: int, seed: int, folder: Path) -> Counter[str]:
    """Kills so often, at moments uniform over an uninterrupted process's time; a run that ended is compared, and the
    next one begun. Returns how many kills found what."""
    recipe, whole = folder / "recipe.yaml", folder / "whole"
    recipe.write_text(yaml.safe_dump(vars(SMALL) | {"checkpoint_seconds": 0.0} | MODES[mode]))
    rng, found, out = random.Random(seed), Counter[str](), folder / "run"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)

    def go(out: Path, seconds: float | None) -> bool:
        """Whether the process ended by itself."""
        words = ["train", "--config", str(recipe), "--out", str(out), "--resume", "auto"]
        process = processes.Process(target=train_in_a_process, args=(words, str(folder / "output")))
        process.start()
        process.join(LONGEST if seconds is None else seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        code = process.exitcode
        process.close()
        assert code in (0, -signal.SIGKILL if seconds is not None else 0), (folder / "output").read_text()
        return code == 0

    first = processes.Process(target=int)  # waits for the imports, which are not to count below
    first.start()
    first.join()
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
