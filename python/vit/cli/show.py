"""What commands show: tables and progress drawn by rich on a terminal, plain text in a pipe and without rich."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..support.extras import interactive
from ..support.files import to_json, write_text


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO, *, title: str = "", left: int = 1
) -> None:
    """Prints rows under their columns; the first `left` columns hold words, the others figures.

    On a terminal a rich table, in a pipe aligned lines under a line of column names; under its title, where it has one.
    """
    if not interactive(stream):
        for line in ([title] if title else []) + aligned([columns, *rows], left):
            print(line, file=stream)
        stream.flush()
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        drawn.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))  # Text: no cell is read as markup
    Console(file=stream, highlight=False).print(drawn)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows as lines with columns of equal width, the first `left` of them aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def save_json(report: dict[str, Any], target: str | None) -> None:
    """Prints the report on one line for "-", else writes it to a file, which is replaced when all of it is there."""
    if target == "-":
        print(to_json(report))
    elif target:
        path, text = Path(target).resolve(), to_json(report, indent=1)
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a device or a pipe
        else:
            write_text(path, text)


class Progress:
    """How far a command is, while it lasts: a bar with the latest text on a terminal, nothing in a pipe.

    Used by `with`; what is printed meanwhile goes inside `with progress.aside():`, which takes the bar away.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._bar: Any = None
        stream = stream or sys.stderr
        if not interactive(stream):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
        )
        # Redirection would move what goes to a piped standard output onto the terminal of the bar.
        self._bar = Bar(*columns, console=Console(file=stream), transient=True, redirect_stdout=False)
        self._task = self._bar.add_task("", total=total, text="")

    def step(self, text: str, advance: float = 1) -> None:
        if self._bar:
            from rich.markup import escape

            self._bar.update(self._task, advance=advance, text=escape(text))

    @contextmanager
    def aside(self) -> Iterator[None]:
        if self._bar:
            self._bar.stop()
        yield
        if self._bar:
            self._bar.start()

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
