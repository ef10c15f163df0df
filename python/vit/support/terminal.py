"""What may be drawn on a terminal: a bar, with rich, where the stream is one."""

from __future__ import annotations

from typing import Any, TextIO

from .extras import interactive, require

__all__ = ["StepBar", "interactive"]


class StepBar:
    """A bar over a known number of steps with two short texts beside it; all of it fits 80 columns."""

    def __init__(self, stream: TextIO) -> None:
        rich = require("rich.progress", "train")
        console = require("rich.console", "train").Console(file=stream)
        self.progress: Any = rich.Progress(
            rich.BarColumn(bar_width=16),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[figures]}  {task.description}"),
            console=console,
        )
        self.task: Any = None

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, done: int, total: int) -> None:
        """Shows the bar, `done` of `total` steps full."""
        self.task = self.progress.add_task("", total=total, completed=done, figures="")
        self.progress.start()

    def advance(self, text: str) -> None:
        """One step more, and the text behind it."""
        self.progress.update(self.task, advance=1, description=text)

    def figures(self, text: str) -> None:
        """The text in the middle."""
        self.progress.update(self.task, figures=text)

    def stop(self) -> None:
        """Leaves the bar as it is."""
        self.progress.stop()
