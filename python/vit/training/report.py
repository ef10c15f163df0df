"""What a training says at its start, and what it writes at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..tasks import Evaluation
from .optim import used_decay

if TYPE_CHECKING:
    from .loop import Training


def announce(training: Training) -> None:
    """The first lines of a session: run folder, data, backend, and the decay that the average reaches."""
    config, source, say = training.config, training.parts.source, training.display.line
    sizes = ", ".join(f"{len(source.splits[name]):,} {name}" for name in ("train", "val", "test"))
    say(
        f"run {training.run.path}: {training.parts.info['name']} on {source.name} "
        f"({len(source.class_names):,} classes; {sizes} images)"
    )
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count != 1)}" if training.accelerator.device.type == "cpu" else ""
    say(f"backend {training.backend} on {training.accelerator.device}{threads}, {training.steps} steps per epoch")
    if config.ema:
        total = (config.epochs or 0) * training.steps
        reached = used_decay(config.ema, total)
        if reached < config.ema:
            say(
                f"averaged weights: the decay rises as (1 + t) / (10 + t) and reaches {reached:.4f} in these "
                f"{total:,} steps, not the {config.ema} of --ema"
            )


def write_final(training: Training, test: Evaluation | None, seconds: float) -> None:
    """The last line of the metrics, the kept epoch in words, and the pictures."""
    from ..viz import curves

    progress, splits, task = training.progress, training.parts.source.splits, training.task
    final: dict[str, Any] = {"final": True, "best_epoch": progress.best_epoch}
    final |= {f"val_{name}": value for name, value in progress.best.items()}
    final["val_images"] = len(splits["val"])
    if test:
        final |= {f"test_{name}": value for name, value in task.figures(test).items()} | {"test_images": test.images}
    final |= {"backend": training.backend, "seconds": round(seconds, 3)}
    training.run.log(final, progress.metrics_bytes)
    if progress.best:
        chosen = task.describe(progress.best, len(splits["val"]))
        training.display.line(f"kept epoch {progress.best_epoch}: {chosen} on {len(splits['val']):,} validation images")
    curves(training.run.read_metrics(), *training.run.pictures("curves"))
    if test:
        task.picture(test, training.parts.source.class_names, training.run.pictures(task.picture_name))
