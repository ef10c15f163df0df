"""The weights of the best epochs, beside those of the best and of the last one."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..tasks import Task
from .run import Run


def best_epochs(lines: Sequence[Mapping[str, Any]], task: Task, count: int | str) -> list[int]:
    """The numbers of the `count` best epochs among the lines of metrics.jsonl, the best first; of equal ones the
    earlier. Without validation the last ones. "all": every one."""
    epochs = [line for line in lines if "epoch" in line]
    count = len(epochs) if isinstance(count, str) else count
    if any(f"val_{task.metric}" not in line for line in epochs):
        return [line["epoch"] for line in epochs[::-1][:count]]

    def order(left: Mapping[str, Any], right: Mapping[str, Any]) -> int:
        return task.better(_figures(right), _figures(left)) - task.better(_figures(left), _figures(right))

    return [line["epoch"] for line in sorted(epochs, key=functools.cmp_to_key(order))[:count]]


def _figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The validation figures of a line; a loss that was not finite is null in JSON."""
    found = {key.removeprefix("val_"): value for key, value in line.items() if key.startswith("val_")}
    return {key: math.inf if value is None else value for key, value in found.items()}


def keep_best(run: Run, task: Task, weights: Mapping[str, Tensor], count: int | str, size: int) -> None:
    """Keeps the weights of the `count` best epochs as epoch-N.safetensors, of which `weights` are the last one's, and
    removes those that are not among them any more.

    What is best is read from the first `size` bytes of metrics.jsonl, so a training that goes on from any checkpoint
    comes to the same files.
    """
    lines = run.read_metrics(size)
    chosen = best_epochs(lines, task, count)
    if lines and lines[-1].get("epoch") in chosen:
        run.save_weights(dict(weights), run.epoch_weights(lines[-1]["epoch"]))
    wanted = {run.epoch_weights(epoch) for epoch in chosen}
    for path in run.path.glob("epoch-*.safetensors"):
        if path not in wanted:
            path.unlink(missing_ok=True)
