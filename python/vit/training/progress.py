"""What a person sees of a training: a bar on a terminal, plain lines in a pipe or a log."""

from __future__ import annotations

import resource
import sys
import time
from datetime import timedelta
from typing import Any, Protocol, TextIO

import torch

from ..support.terminal import StepBar, interactive
from ..support.text import printable


class Display(Protocol):
    """Receives lines of text, what each step says, and the line of each epoch in the metrics."""

    def line(self, text: str) -> None: ...
    def start(self, done: int, total: int, images: int = 0, seconds: float = 30.0) -> None:
        """`done` of `total` steps, `images` in each; lines tell of a step at most every `seconds`."""

    def step(self, text: str) -> None: ...
    def epoch(self, line: dict[str, Any], epochs: int) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Shows nothing: other processes than the first, and callers from Python."""

    def line(self, text: str) -> None: ...
    def start(self, done: int, total: int, images: int = 0, seconds: float = 30.0) -> None: ...
    def step(self, text: str) -> None: ...
    def epoch(self, line: dict[str, Any], epochs: int) -> None: ...
    def stop(self) -> None: ...


class Lines:
    """One plain line per epoch, and between them one for the first step and then one every so many seconds."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.done = self.total = self.images = 0
        self.seconds = 30.0

    def line(self, text: str) -> None:
        print(printable(text), file=self.stream, flush=True)

    def start(self, done: int, total: int, images: int = 0, seconds: float = 30.0) -> None:
        self.first, self.done, self.total, self.images, self.seconds = done, done, total, images, seconds
        self.began = self.told_at = time.monotonic()
        self.told = done

    def step(self, text: str) -> None:
        self.done += 1
        now = time.monotonic()
        if self.total and (now - self.told_at >= self.seconds or self.done == self.first + 1):
            speed = (self.done - self.told) / max(now - self.told_at, 1e-9)
            pace = (now - self.began) / (self.done - self.first)
            left = timedelta(seconds=round(pace * (self.total - self.done)))
            self.line(f"step {self.done:,}/{self.total:,}  {text}  {speed * self.images:,.0f} images/s  {left} left")
            self.told, self.told_at = self.done, now

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        loss = f"  val loss {line['val_loss']:.4f}" if "val_loss" in line else ""
        shares = "".join(f"  val {name} {100 * value:.2f} %" for name, value in _validated(line))
        times = _times(line.get("step_ms", {}))
        self.line(f"epoch {line['epoch']:>3}/{epochs}  train loss {line['train_loss']:.4f}{loss}{shares}{times}")

    def stop(self) -> None: ...


class Bar:
    """A bar over all steps with images per second, and below it epoch, validation, loss, accuracy and memory."""

    def __init__(self, stream: TextIO) -> None:
        self.bar = StepBar(stream)
        self.images, self.epochs = 0, ""

    def line(self, text: str) -> None:
        self.bar.line(printable(text))

    def start(self, done: int, total: int, images: int = 0, seconds: float = 30.0) -> None:
        self.images = images
        self.bar.start(done, total)

    def step(self, text: str) -> None:
        self.bar.advance(f"{self.bar.pace() * self.images:,.0f} images/s")
        figures = [word for word in text.split("  ") if not word.startswith("lr ")]
        self.bar.figures("  ".join(filter(None, [self.epochs, *figures, f"{peak_memory() / 2**20:,.0f} MiB"])))

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        validation = "".join(f"  val {100 * value:.2f} %" for _, value in _validated(line)[:1])
        self.epochs = f"epoch {line['epoch']}/{epochs}{validation}"
        self.bar.figures(self.epochs)

    def stop(self) -> None:
        self.bar.stop()


def _validated(line: dict[str, Any]) -> list[tuple[str, float]]:
    """The shares that the validation found, by name; the task's own figure stands last in a line, and here first."""
    found = [(name.removeprefix("val_"), line[name]) for name in line if name.startswith("val_") and name != "val_loss"]
    return found[::-1]


def _times(step_ms: dict[str, float]) -> str:
    """Where the time of a step went."""
    whole = sum(step_ms.values())
    shares = ", ".join(f"{phase} {100 * ms / whole:.0f} %" for phase, ms in step_ms.items()) if whole else ""
    return f"  step {whole:.1f} ms ({shares})" if shares else ""


def peak_memory() -> int:
    """Bytes: the most that this process has had, on its GPU if it uses one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux


def display(stream: TextIO | None = None) -> Display:
    """A bar if the stream (default: standard output) is a terminal and rich is installed, else lines."""
    stream = stream or sys.stdout
    return Bar(stream) if interactive(stream) else Lines(stream)
