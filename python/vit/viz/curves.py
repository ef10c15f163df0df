"""Loss, error and learning rate over the epochs of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figure import new_figure, save


def curves(
    metrics: Sequence[dict[str, Any]], *paths: str | Path, metric: str = "accuracy", name: str = "accuracy"
) -> None:
    """Draws the lines of metrics.jsonl into files; the suffix is the format (png, pdf, svg).

    Training and validation are compared by the same criterion, such as plain cross entropy, and by the error in percent
    on a logarithmic axis: what the figure `metric`, in words `name`, lacks. The test figures stand in the title: they
    belong to no point of the curves.
    """
    epochs = [
        line | {"epoch": line.get("epoch", line.get("at"))} for line in metrics if "epoch" in line or "at" in line
    ]
    final = next((line for line in metrics if line.get("final")), {})
    error = "error" if metric == "accuracy" else f"1 - {name}"
    reserved = ("train_loss", f"train_{metric}", "train_accuracy")
    trained = next((key for line in epochs for key in line if key.startswith("train_") and key not in reserved), None)
    figure = new_figure(11, 3.8)
    losses, errors, rate = figure.subplots(1, 3)
    if trained:
        _plot(losses, epochs, trained, "C0", "training (augmented images)")
    _plot(losses, epochs, "val_loss", "C1", "validation")
    losses.set(title=(trained or "loss").removeprefix("train_").replace("_", " "), xlabel="epoch", yscale="log")
    _plot_errors(errors, epochs, final, metric)
    errors.set(title=f"{error}, %", xlabel="epoch", yscale="log")
    _plot(rate, epochs, "lr", "C2", "")
    rate.set(title="learning rate", xlabel="epoch")
    for axes in (losses, errors, rate):
        axes.grid(alpha=0.3, which="both")
    for axes in (losses, errors):
        if axes.get_legend_handles_labels()[0]:  # there may be nothing to draw
            axes.legend()
    if f"test_{metric}" in final:
        loss = final["test_loss"]  # null in JSON where it was no finite number
        figure.suptitle(
            f"test {error} {100 - 100 * final[f'test_{metric}']:.2f} %, loss "
            f"{'nan' if loss is None else f'{loss:.4f}'} "
            f"({final['test_images']:,} images, weights of epoch {final['best_epoch']})",
            fontsize="medium",
        )
    for path in paths:
        save(figure, Path(path))


def _plot(axes: Any, epochs: Sequence[dict[str, Any]], key: str, colour: str, label: str) -> None:
    points = [(line["epoch"], line[key]) for line in epochs if line.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="." if len(points) < 3 else None)


def _plot_errors(axes: Any, epochs: Sequence[dict[str, Any]], final: dict[str, Any], metric: str) -> None:
    """Error in percent. A logarithmic axis has no zero: no error at all is drawn as half an image."""
    floor = 50 / max(1, final.get("val_images", 0) or 1000)
    for key, colour, label in (
        (f"train_{metric}", "C0", "training (augmented images)"),
        (f"val_{metric}", "C1", "validation"),
    ):
        points = [(line["epoch"], max(floor, 100 - 100 * line[key])) for line in epochs if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="." if len(points) < 3 else None)
    name = f"val_{metric}"
    place = ("step", final["best_step"]) if "best_step" in final else ("epoch", final.get("best_epoch"))
    kept = next((line for line in epochs if line.get(place[0]) == place[1] and name in line), None)
    if kept:
        error = max(floor, 100 - 100 * kept[name])
        axes.plot([kept["epoch"]], [error], "ko", fillstyle="none", label=f"kept: epoch {kept['epoch']:g}")
