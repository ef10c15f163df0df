"""Pictures beside the classes of their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .figure import new_figure, save

NAMED = 20  # classes up to which the figure has a legend


def colours(count: int) -> np.ndarray:
    """A colour for each of `count` classes, uint8 [count, 3]: the one of PASCAL VOC's palette, by the class's bits."""
    found = np.zeros((count, 3), np.uint8)
    for place in range(8):
        bits = np.arange(count) >> (3 * place)
        for channel in range(3):
            found[:, channel] |= (((bits >> channel) & 1) << (7 - place)).astype(np.uint8)
    return found


def painted(mask: Any) -> np.ndarray:
    """The colours of a mask's classes, uint8 [H, W, 3]; white where there is none (255)."""
    values = np.asarray(mask)
    palette = colours(256)
    palette[255] = 255
    return np.asarray(palette[values])


def answers(rows: Sequence[tuple[Any, Any, Any]], class_names: Sequence[str], path: str | Path) -> None:
    """Draws image, mask and answer of each row into a file, a PNG, PDF or SVG by its suffix."""
    figure = new_figure(6.0, 2.0 * len(rows) + 0.6)
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for axes, (image, mask, answer) in zip(grid, rows, strict=True):
        pictures = (image, painted(mask), painted(answer))
        for place, title, picture in zip(axes, ("image", "classes", "answer"), pictures, strict=True):
            place.imshow(np.asarray(picture), cmap="gray")
            place.set_axis_off()
            if axes is grid[0]:
                place.set_title(title)
    if len(class_names) <= NAMED:
        from matplotlib.patches import Patch

        marks = [
            Patch(color=colour / 255, label=name)
            for colour, name in zip(colours(len(class_names)), class_names, strict=True)
        ]
        legend = figure.legend(handles=marks, loc="outside lower center", ncols=4, fontsize="small")
        for text in legend.get_texts():
            text.set_parse_math(False)
    save(figure, Path(path))
