"""What a person sees of a training: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from typing import Any, Protocol, TextIO

from ..support.extras import interactive, require


class Display(Protocol):
    """Receives lines of text, what each step says, and the line of each epoch in the metrics."""

    def line(self, text: str) -> None: ...
    def start(self, done: int, total: int) -> None: ...
    def step(self, text: str) -> None: ...
    def epoch(self, line: dict[str, Any], epochs: int) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Shows nothing: other processes than the first, and callers from Python."""

    def line(self, text: str) -> None: ...
    def start(self, done: int, total: int) -> None: ...
    def step(self, text: str) -> None: ...
    def epoch(self, line: dict[str, Any], epochs: int) -> None: ...
    def stop(self) -> None: ...


class Lines:
    """One plain line per epoch."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def start(self, done: int, total: int) -> None: ...

    def step(self, text: str) -> None: ...

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        self.line(
            f"epoch {line['epoch']:>3}/{epochs}  train loss {line['train_loss']:.4f}  "
            f"val loss {line['val_loss']:.4f}  val accuracy {100 * line['val_accuracy']:.2f} %"
        )

    def stop(self) -> None: ...


class Bar:
    """A bar over all steps, with the latest figures beside it."""

    def __init__(self, stream: TextIO) -> None:
        rich = require("rich.progress", "train")
        console = require("rich.console", "train").Console(file=stream)
        self.progress: Any = rich.Progress(
            # 80 columns hold all of it.
            rich.BarColumn(bar_width=16),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[figures]}  {task.description}"),
            console=console,
        )
        self.task: Any = None

    def line(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, done: int, total: int) -> None:
        self.task = self.progress.add_task("", total=total, completed=done, figures="")
        self.progress.start()

    def step(self, text: str) -> None:
        self.progress.update(self.task, advance=1, description=text)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        self.progress.update(
            self.task, figures=f"epoch {line['epoch']}/{epochs}  val {100 * line['val_accuracy']:.2f} %"
        )

    def stop(self) -> None:
        self.progress.stop()


def display(stream: TextIO | None = None) -> Display:
    """A bar if the stream (default: standard output) is a terminal and rich is installed, else lines."""
    stream = stream or sys.stdout
    return Bar(stream) if interactive(stream) else Lines(stream)
