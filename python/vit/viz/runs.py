"""The validation of several trainings in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figure import new_figure, save

NAMED = 20  # runs up to which the figure has a legend


def compare(runs: Mapping[str, Sequence[dict[str, Any]]], metric: str, *paths: str | Path) -> None:
    """Draws validation loss and `metric` over the epochs, a line for each run, into files (png, pdf, svg).

    runs: name -> the lines of its metrics.jsonl; a run without validation is drawn by its training's cross entropy
    """
    figure = new_figure(11, 4.5)
    losses, values = figure.subplots(1, 2)
    for number, (name, metrics) in enumerate(runs.items()):
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}
        epochs = [line for line in metrics if "epoch" in line]
        _line(losses, epochs, ("val_loss", "train_cross_entropy", "train_loss"), 1.0, style, name)
        _line(values, epochs, (f"val_{metric}", f"train_{metric}"), 100.0, style, name)
    losses.set(title="validation loss", xlabel="epoch", yscale="log")
    values.set(title=f"validation {metric}, %", xlabel="epoch")
    for axes in (losses, values):
        axes.grid(alpha=0.3, which="both")
    if 0 < len(runs) <= NAMED:
        handles, names = losses.get_legend_handles_labels()
        legend = figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize="small")
        for text in legend.get_texts():
            text.set_parse_math(False)
    for path in paths:
        save(figure, Path(path))


def _line(
    axes: Any, epochs: Sequence[dict[str, Any]], keys: Sequence[str], scale: float, style: dict[str, str], name: str
) -> None:
    """The first of the figures `keys` that the epochs have."""
    for key in keys:
        points = [(line["epoch"], scale * line[key]) for line in epochs if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 3 else None, **style)
            return
