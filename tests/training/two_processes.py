"""What each of two processes does in test_processes.py: trainings side by side, and the last one loses a process."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch
from training_helpers import SMALL, Hook, terminate
from vit.training import Interrupted, TrainConfig, TrainError, train
from vit.training.step import Stepper

#: Random numbers of a process's own (stochastic depth) would be others in one process.
CONFIG = dataclasses.replace(SMALL, epochs=6, drop_path=0.0, augment="none", threads=1, lr=3e-3)
HALF = dataclasses.replace(CONFIG, batch_size=64)


def main(out: Path) -> None:
    """Runs them all; rank 0 writes how the last one ended."""
    torch.set_num_threads(1)
    train(HALF, out=out / "ddp")
    sharded = dataclasses.replace(HALF, parallel="fsdp")
    train(sharded, out=out / "fsdp")
    train(dataclasses.replace(sharded, ema=0.0, clip=0.0, epochs=2), out=out / "plain")
    interrupt(dataclasses.replace(sharded, epochs=2), out / "interrupted")
    train(dataclasses.replace(sharded, epochs=2), out=out / "whole")
    try:
        lose_one(out / "lost")
    except TrainError as error:
        (out / "error.txt").write_text(str(error))
    os._exit(0)  # nothing is left to say good-bye to


def interrupt(config: TrainConfig, run: Path) -> None:
    """A training that is stopped at its fifth step by a signal to one process, and goes on."""
    try:
        train(config, out=run, display=Hook(5, terminate))
    except Interrupted:
        torch.distributed.barrier()
        train(resume=run)


def lose_one(run: Path) -> None:
    """A training whose second process is killed in its fourth step."""
    plain, steps = Stepper.step, [0]

    def step(self, passes):
        steps[0] += 1
        if steps[0] == 4 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, passes)

    Stepper.step = step  # type: ignore[method-assign]
    train(HALF, out=run)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
