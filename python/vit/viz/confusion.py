"""Which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .figure import new_figure, save

NUMBERED = 30  # classes up to which every cell shows its count


def confusion_matrix(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """int64 [classes, classes]: entry (i, j) counts images of class i that were taken for class j."""
    return torch.bincount(labels * classes + predictions, minlength=classes * classes).view(classes, classes)


def confusion(labels: Tensor, predictions: Tensor, class_names: Sequence[str], path: str | Path) -> None:
    """Draws the confusion matrix into a file, a PNG, PDF or SVG by its suffix; colours are shares of a row, numbers are
    images."""
    classes = len(class_names)
    counts = confusion_matrix(labels, predictions, classes)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(16.0, 3.0 + 0.35 * classes)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the class")
    right = int(counts.diagonal().sum())
    axes.set(
        title=f"{right} of {len(labels)} right ({100 * right / max(1, len(labels)):.2f} %)",
        xlabel="predicted",
        ylabel="class",
    )
    if classes <= NUMBERED:
        turn = 45 if max(map(len, class_names)) > 2 else 0
        axes.set_xticks(range(classes), class_names, rotation=turn, ha="center", parse_math=False)
        axes.set_yticks(range(classes), class_names, parse_math=False)
        for i, j in counts.nonzero().tolist():
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=colour, fontsize=8)
    save(figure, Path(path))
