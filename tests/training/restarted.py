"""What torchrun starts in test_processes.py, twice: the first time one of two processes is killed in its 13th step."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from two_processes import HALF
from vit.training import train
from vit.training.step import Stepper


def main(out: Path, killed: str) -> None:
    torch.set_num_threads(1)
    plain, steps = Stepper.step, [0]

    def step(self, passes):
        steps[0] += 1
        if steps[0] == 13 and os.environ["RANK"] == killed and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, passes)

    Stepper.step = step  # type: ignore[method-assign]
    train(HALF, out=out, resume="auto")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
