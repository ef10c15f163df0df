"""Loss, accuracy and learning rate over the epochs of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figure import new_figure, save


def curves(metrics: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draws the lines of metrics.jsonl into a PNG file."""
    epochs = [line for line in metrics if "epoch" in line]
    final = next((line for line in metrics if line.get("final")), None)
    x = [line["epoch"] for line in epochs]
    figure = new_figure(11, 3.6)
    losses, accuracy, rate = figure.subplots(1, 3)

    losses.plot(x, [line["train_loss"] for line in epochs], label="training (smoothed labels)")
    losses.plot(x, [line["val_loss"] for line in epochs], label="validation")
    losses.set(title="loss", xlabel="epoch", yscale="log")
    accuracy.plot(x, [100 * line["val_accuracy"] for line in epochs], color="C1", label="validation")
    accuracy.set(title="accuracy, %", xlabel="epoch")
    rate.plot(x, [line["lr"] for line in epochs], color="C2")
    rate.set(title="learning rate", xlabel="epoch")
    if final:
        text = f"test {100 * final['test_accuracy']:.2f}"
        accuracy.plot([final["best_epoch"]], [100 * final["test_accuracy"]], "k*", markersize=9, label=text)
    losses.legend()
    accuracy.legend(loc="lower right")
    for axes in (losses, accuracy, rate):
        axes.grid(alpha=0.3)
    save(figure, Path(path))
