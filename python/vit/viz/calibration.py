"""How sure a classifier is, and how often it is right then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .figure import new_figure, save


def calibration(bins: Sequence[tuple[int, float, float]], ece: float, path: str | Path) -> None:
    """Draws the reliability diagram (arXiv:1706.04599) into a file, a PNG, PDF or SVG by its suffix.

    bins: images, mean confidence and accuracy of each bin of the confidence; ece: the expected calibration error
    """
    figure = new_figure(4.4, 5.2)
    shares, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    images, sure, right = zip(*bins, strict=True) if bins else ((), (), ())
    shares.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="as sure as right")
    shares.vlines(sure, sure, right, color="C3", alpha=0.5, linewidth=4)
    shares.plot(sure, right, "C0o-", label="this model")
    shares.set(
        title=f"calibration error {100 * ece:.2f} %", ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1.02)
    )
    shares.legend(loc="upper left")
    shares.grid(alpha=0.3)
    counts.bar(sure, images, 0.04, color="C0")
    counts.set(xlabel="confidence", ylabel="images", yscale="log" if images else "linear")
    save(figure, path)
