"""Pictures beside each other, in rows: images, what they are labelled with, and what a model answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .figure import new_figure, save


def rows(
    pictures: Sequence[Sequence[Any]], titles: Sequence[str], path: str | Path, legend: Sequence[tuple[str, Any]] = ()
) -> None:
    """Draws rows of pictures, each column under its title, into a PNG, PDF or SVG by the suffix of `path`.

    legend: names and their colours [3] of 0 to 255
    """
    figure = new_figure(2.0 * len(titles), 2.0 * len(pictures) + 0.6)
    grid = figure.subplots(len(pictures), len(titles), squeeze=False)
    for axes, row in zip(grid, pictures, strict=True):
        for place, title, picture in zip(axes, titles, row, strict=True):
            place.imshow(np.asarray(picture), cmap="gray")
            place.set_axis_off()
            if axes is grid[0]:
                place.set_title(title)
    if legend:
        from matplotlib.patches import Patch

        marks = [Patch(color=tuple(level / 255 for level in colour), label=name) for name, colour in legend]
        drawn = figure.legend(handles=marks, loc="outside lower center", ncols=4, fontsize="small")
        for text in drawn.get_texts():
            text.set_parse_math(False)
    save(figure, Path(path))
