"""How long the parts of a training step take: waiting for images, forward, backward, optimizer."""

from __future__ import annotations

import time
from typing import Any

import torch

PHASES = ("data", "forward", "backward", "optimizer")


class Phases:
    """Adds up the time between marks, each of which ends a phase.

    On a GPU, where a call returns before its kernels have run, the marks are events of the stream: nothing waits for
    them but the end of the step, which has waited for the loss already.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = None if device.type == "cpu" else getattr(torch, device.type).Event
        self._marks: list[tuple[str, Any]] = []
        self.clear()

    def clear(self) -> None:
        """Starts anew: an epoch has its own times."""
        self.steps = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def begin(self) -> None:
        """A step begins."""
        self._marks = [("", self._now())]

    def mark(self, phase: str) -> None:
        """What was done since the last mark belongs to this phase."""
        self._marks.append((phase, self._now()))

    def end(self) -> None:
        """The step is over."""
        if self._events is not None:
            self._marks[-1][1].synchronize()
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            self.seconds[phase] += after - before if self._events is None else before.elapsed_time(after) / 1000
        self.steps += 1

    def total(self) -> float:
        """Seconds of all phases and steps."""
        return sum(self.seconds.values())

    def per_step(self) -> dict[str, float]:
        """Milliseconds of each phase, the mean over the steps since `clear`; nothing without steps."""
        if not self.steps:
            return {}
        return {phase: round(1000 * seconds / self.steps, 3) for phase, seconds in self.seconds.items()}

    def _now(self) -> Any:
        if self._events is None:
            return time.perf_counter()
        event = self._events(enable_timing=True)
        event.record()
        return event
