"""Where the time of a training's steps went, over its epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figure import new_figure, save

COLOURS = {"data": "C3", "forward": "C0", "backward": "C1", "optimizer": "C2"}


def phases(metrics: Sequence[dict[str, Any]], *paths: str | Path) -> None:
    """Draws `step_ms` of the lines of metrics.jsonl into files: milliseconds of a step, phase on phase.

    The suffix is the format (png, pdf, svg).
    """
    epochs = [line for line in metrics if "epoch" in line and line.get("step_ms")]
    figure = new_figure(6, 3.8)
    axes = figure.subplots()
    floor = [0.0] * len(epochs)
    for name, colour in COLOURS.items():
        heights = [line["step_ms"].get(name, 0.0) for line in epochs]
        whole = sum(sum(line["step_ms"].values()) for line in epochs) or 1.0
        label = f"{name}, {100 * sum(heights) / whole:.0f} %"
        axes.bar([line["epoch"] for line in epochs], heights, 1.0, floor, color=colour, label=label)
        floor = [low + high for low, high in zip(floor, heights, strict=True)]
    axes.set(title="time of a step", xlabel="epoch", ylabel="ms")
    if epochs:
        axes.legend()
    for path in paths:
        save(figure, Path(path))
