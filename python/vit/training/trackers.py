"""Curves in TensorBoard, W&B or trackio, by accelerate's trackers. metrics.jsonl has the figures without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..support.extras import require
from .run import Run

#: --logger -> the package it needs, which is also the name of the extra.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
EVERY = 20  # steps between two points of the training's loss


def check(name: str) -> None:
    """MissingExtra, which says how to install it, where the package of a logger is missing."""
    if name in PACKAGES:
        require(PACKAGES[name], PACKAGES[name])


class Tracker:
    """Sends figures of a run to a logger; "none": nowhere.

    A logger that fails is named once and left out from there on: it must not cost the training.
    """

    def __init__(self, name: str, run: Run, step: int, say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self.tracker: Any = None
        if name != "none":
            self._try(lambda: self._start(run, step))

    def _start(self, run: Run, step: int) -> None:
        trackers = require("accelerate.tracking", "train")
        options = dataclasses.asdict(run.config)
        if self.name == "tensorboard":  # what was logged after the step that a resumed run goes on from is done again
            tracker = trackers.TensorBoardTracker("tensorboard", run.path, purge_step=step + 1 if step else None)
        elif self.name == "wandb":
            same = {"name": run.path.name, "id": run.path.name, "resume": "allow"}
            tracker = trackers.WandBTracker("vit", dir=str(run.path), config=options, **same)
        else:
            tracker = trackers.TrackioTracker("vit", name=run.path.name, config=options, resume="allow")
        tracker.start()
        self.tracker = tracker
        if self.name == "tensorboard":
            tracker.log({"config": f"```yaml\n{run.config.to_yaml()}```"}, step=step)

    def step(self, step: int, loss: float, lr: float) -> None:
        """The loss of a training step: every EVERY steps."""
        if self.tracker and step % EVERY == 0:
            self._try(lambda: self.tracker.log({"step/loss": loss, "step/lr": lr}, step=step))

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: train_loss becomes train/loss, the phases of a step time/data and so on."""
        if self.tracker:
            self._try(lambda: self.tracker.log(named(line), step=line.get("step")))

    def close(self) -> None:
        """Writes what is left."""
        if self.tracker:
            self._try(self.tracker.finish)
            self.tracker = None

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self.tracker = None
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.say(f"--logger {self.name} failed: {text}; the training goes on without it")


def named(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by the names that loggers group them by."""
    found: dict[str, float] = {f"time/{phase} (ms)": ms for phase, ms in line.get("step_ms", {}).items()}
    for key, value in line.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("step", "seconds"):
            group, _, name = key.partition("_")
            found[f"{group}/{name}" if group in ("train", "val", "test") else f"run/{key}"] = value
    return found
