"""What may be drawn on a terminal: a bar, with rich, where the stream is one."""

from __future__ import annotations

from typing import Any, TextIO

from .extras import interactive, require

__all__ = ["StepBar", "interactive"]


class StepBar:
    """A bar over a known number of steps, its times and its pace; below it a line of figures. Both fit 80 columns."""

    def __init__(self, stream: TextIO) -> None:
        rich = require("rich.progress", "train")
        console = require("rich.console", "train").Console(file=stream)
        self.progress: Any = rich.Progress(
            rich.BarColumn(bar_width=24),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.description}"),
            console=console,
        )
        self.text: Any = require("rich.text", "train").Text("", no_wrap=True, overflow="ellipsis")
        both = require("rich.console", "train").Group(self.progress, self.text)
        self.live: Any = require("rich.live", "train").Live(both, console=console, refresh_per_second=8)
        self.task: Any = None

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        self.live.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, done: int, total: int) -> None:
        """Shows the bar, `done` of `total` steps full."""
        self.task = self.progress.add_task("", total=total, completed=done)
        self.live.start()

    def advance(self, text: str) -> None:
        """One step more, and the text behind the bar."""
        self.progress.update(self.task, advance=1, description=text)

    def pace(self) -> float:
        """Steps in a second, over the last ones."""
        return float(self.progress.tasks[0].speed or 0.0)

    def figures(self, text: str) -> None:
        """The line below the bar."""
        self.text.plain = text

    def stop(self) -> None:
        """Leaves the bar as it is."""
        self.live.stop()
