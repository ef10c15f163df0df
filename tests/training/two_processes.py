"""What each of two processes does in test_processes.py: trainings side by side, and the last one loses a process."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_helpers import SMALL, Hook, terminate
from vit.optim import AdamW
from vit.support.random import Stream
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
    (out / f"optimizer-{torch.distributed.get_rank()}.txt").write_text(str(optimizer_of_parts(out / "parts")))
    try:
        lose_one(out / "lost")
    except TrainError as error:
        (out / "error.txt").write_text(str(error))
    os._exit(0)  # nothing is left to say good-bye to


def optimizer_of_parts(place: Path) -> list[bool]:
    """AdamW of 8 bits over FSDP2's parameters, in a loop of its own, saved by torch.distributed.checkpoint after ten
    steps and loaded: whether five more steps give the bits of the one that went on. By kernel and by reference; 257
    rows are no even number."""
    return [_goes_on(place / name, name) for name in ("auto", "reference")]


def _goes_on(place: Path, backend: str) -> bool:
    rank = torch.distributed.get_rank()
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 257), nn.GELU(), nn.Linear(257, 10))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        models.append(model)
        optimizers.append(AdamW(model.parameters(), lr=3e-3, state="8bit", backend=backend))

    def fit(which: int, steps: range) -> None:
        for step in steps:
            x = torch.from_numpy(Stream("parts", step, rank).standard_normal((16, 64)))
            optimizers[which].zero_grad()
            nn.functional.cross_entropy(models[which](x), x[:, :10].argmax(1)).backward()
            optimizers[which].step()

    fit(0, range(10))
    state, of_optimizer = get_state_dict(models[0], optimizers[0])
    checkpoint.save({"model": state, "optimizer": of_optimizer}, checkpoint_id=place)
    state, of_optimizer = get_state_dict(models[1], optimizers[1])
    checkpoint.load({"model": state, "optimizer": of_optimizer}, checkpoint_id=place)
    set_state_dict(models[1], optimizers[1], model_state_dict=state, optim_state_dict=of_optimizer)
    for which in range(2):
        fit(which, range(10, 15))
    pairs = zip(*(model.parameters() for model in models), strict=True)
    return all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)


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
