"""A figure of equal panels placed in inches, and what goes into one: an image, a map over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .figure import new_figure

WIDTH = 7.0  # inches: two columns of a paper
PANEL = (0.7, 2.4)  # narrowest and widest panel, inches
HEAD, FOOT, GAP, MARGIN = 0.2, 0.17, 0.07, 0.08  # inches above, below and between panels, around all
TITLE, SMALL = 9, 6.5  # points
TALLEST = 100.0  # inches: 16,000 pixels; the renderers stop at 65,536
#: Perceptually uniform, and the same order of brightness for every kind of colour vision.
COLOURS = "viridis"


def sheet(
    aspects: Sequence[float],
    columns: int,
    title: str,
    below: float = 0.0,
    bar: float = 0.0,
    left: float = 0.0,
    panel: float | None = None,
) -> tuple[Any, Any]:
    """An empty figure and its axes [rows][columns] without frames: a row's panels are `aspect` times as high as wide.

    In inches: `below` each panel, `bar` to the right and `left` of all; panel: their width, None: as there is room.
    ValueError for more rows than a renderer draws.
    """
    room = WIDTH - 2 * MARGIN - bar - GAP * (columns - 1)
    wide = panel or min(PANEL[1], max(PANEL[0], room / columns))
    top = 0.3 if title else 0.0
    width = 2 * MARGIN + left + columns * wide + GAP * (columns - 1) + bar
    height = 2 * MARGIN + top + sum(wide * aspect + HEAD + below for aspect in aspects)
    if height > TALLEST:
        raise ValueError(
            f"vit: a picture of {len(aspects)} rows is {height:.0f} inches high, the most is {TALLEST:.0f}"
        )
    width = max(width, 0.068 * len(title))  # inches of a letter
    figure = new_figure(width, height, layout=None)
    if title:
        figure.text(MARGIN / width, 1 - MARGIN / height, title, fontsize=TITLE, va="top", parse_math=False)
    axes, y = [], height - MARGIN - top
    for aspect in aspects:
        y -= HEAD + wide * aspect
        places = [MARGIN + left + i * (wide + GAP) for i in range(columns)]
        axes.append([_panel(figure, x / width, y / height, wide / width, wide * aspect / height) for x in places])
        y -= below
    return figure, axes


def _panel(figure: Any, *place: float) -> Any:
    axes = figure.add_axes(place)
    axes.set_axis_off()
    return axes


def label(axes: Any, above: str = "", below: str = "") -> None:
    """Small lines above and below a panel."""
    for text, y, align in ((above, 1.0, "bottom"), (below, 0.0, "top")):
        if text:
            shift = (0, 2 if y else -2)
            axes.annotate(
                text, (0.0, y), shift, xycoords="axes fraction", textcoords="offset points", fontsize=SMALL, va=align,
                parse_math=False,
            )  # fmt: skip


def seen(model: Any, image: Any) -> tuple[Tensor, np.ndarray]:
    """A PIL image as the model takes it [in_chans, height, width], and as it is looked at: [height, width, 3], 0 to
    1."""
    x = model.preprocess(image)
    mean, std = (
        torch.tensor(values, device="cpu")[:, None, None] for values in (model.preprocess.mean, model.preprocess.std)
    )
    pixels = (x * std + mean).clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3)
    return x.to(model.device, model.dtype), pixels.numpy()


def show(axes: Any, pixels: np.ndarray) -> None:
    """An image, its pixels as they are."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")


def overlay(axes: Any, pixels: np.ndarray, values: np.ndarray, patch: tuple[int, int]) -> Any:
    """A map of patches [rows, columns] in colours from 0 to its largest value, over the image in grey."""
    height, width = pixels.shape[:2]
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=pixels.dtype)
    box = (0, width, height, 0)
    axes.imshow(grey, extent=box, interpolation="nearest", aspect="auto", cmap="gray", vmin=0, vmax=1)
    rows, columns = values.shape
    # Patches may end before the image (drop_edge) or after it (dynamic_img_pad).
    covered = (0, columns * patch[1], rows * patch[0], 0)
    drawn = axes.imshow(
        values, extent=covered, interpolation="nearest", aspect="auto", cmap=COLOURS, alpha=0.7,
        vmin=0, vmax=max(float(values.max()), 1e-12),
    )  # fmt: skip
    axes.set(xlim=(0, width), ylim=(height, 0))
    return drawn


def colour_bar(figure: Any, drawn: Any, text: str, ticks: Sequence[float], names: Sequence[str]) -> None:
    """One bar at the right edge, in the room that `sheet(bar=)` left."""
    width, height = figure.get_size_inches()
    long = min(1.6, height - 0.7)
    axes = figure.add_axes(((width - 0.62) / width, (MARGIN + 0.15) / height, 0.09 / width, long / height))
    bar = figure.colorbar(drawn, cax=axes, ticks=ticks)
    bar.ax.set_yticklabels(names, fontsize=SMALL)
    bar.ax.tick_params(length=2, width=0.5)
    bar.outline.set_linewidth(0.5)
    bar.set_label(text, fontsize=SMALL)
    bar.solids.set_alpha(1)
