"""What a training says at its start, after an epoch, and at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..support.text import printable
from ..tasks import Evaluation, Task
from .assembly import Parts
from .config import TrainConfig
from .optim import used_decay
from .run import Run
from .state import Progress


@dataclass(frozen=True)
class TrainResult:
    """What a finished training reports. `test` is None where there are no test images."""

    run: Path
    test: Evaluation | None
    epochs: int
    seconds: float
    backend: str
    best_epoch: int
    is_main: bool  # whether this is the process that speaks for all


def announce(run: Run, parts: Parts, device: torch.device, say: Callable[[str], None]) -> None:
    """The first lines of a session: run folder, data, backend, and the decay that the average reaches."""
    config, source = parts.config, parts.source
    sizes = ", ".join(f"{len(source.splits[name]):,} {name}" for name in ("train", "val", "test"))
    say(f"run {run.path}: {parts.info['name']} on {source.name} ({len(source.class_names):,} classes; {sizes} images)")
    say(f"classes: {_shortened(source.class_names)}")
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count != 1)}" if device.type == "cpu" else ""
    say(f"backend {parts.backend} on {device}{threads}, {parts.steps} steps per epoch")
    if config.ema:
        total = (config.epochs or 0) * parts.steps
        reached = used_decay(config.ema, total)
        if reached < config.ema:
            say(
                f"averaged weights: the decay rises as (1 + t) / (10 + t) and reaches {reached:.4f} in these "
                f"{total:,} steps, not the {config.ema} of --ema"
            )


def _shortened(names: Sequence[str], most: int = 90) -> str:
    """The names, of many the first and the last; as classes are told from folders, a wrong layout shows here."""
    texts = [printable(name) for name in names]
    if len(whole := ", ".join(texts)) <= most:
        return whole
    last = texts[-1][:most]
    while len(texts) > 1 and len(", ".join([*texts, "...", last])) > most:
        texts.pop()
    return ", ".join([texts[0][:most], *texts[1:], "...", last])


def epoch_line(
    config: TrainConfig, task: Task, progress: Progress, steps: int, lr: float, figures: Mapping[str, float]
) -> dict[str, Any]:
    """What metrics.jsonl says of the epoch that ends, `lr` being its last learning rate and `figures` those of the
    validation."""
    taken = max(1, steps - progress.skipped)
    line = {
        "epoch": progress.epoch + 1,
        "step": (progress.epoch + 1) * steps,
        "lr": lr,
        "train_loss": progress.loss_sum / taken,
        **{name: s / taken for name, s in zip(task.monitored, progress.monitor_sums, strict=True)},
        "grad_norm": progress.norm_sum / taken,
        "skipped_steps": progress.skipped,
    }
    if config.ema:
        line["ema_decay"] = used_decay(config.ema, (progress.epoch + 1) * steps)
    return line | {f"val_{name}": value for name, value in figures.items()}


def within_line(progress: Progress, steps: int, lr: float, figures: Mapping[str, float]) -> dict[str, Any]:
    """What metrics.jsonl says of a validation within an epoch; `at`: epochs done, with the part of the present one."""
    line = {
        "at": round(progress.epoch + progress.step / steps, 6),
        "step": progress.epoch * steps + progress.step,
        "lr": lr,
    }
    return line | {f"val_{name}": value for name, value in figures.items()}


def write_final(
    run: Run,
    parts: Parts,
    task: Task,
    progress: Progress,
    test: Evaluation | None,
    seconds: float,
    say: Callable[[str], None],
) -> None:
    """The last line of the metrics, and the kept epoch in words."""
    splits = parts.source.splits
    final: dict[str, Any] = {"final": True, "best_epoch": progress.best_epoch}
    if parts.config.val_steps:
        final["best_step"] = progress.best_step
    final |= {f"val_{name}": value for name, value in progress.best.items()}
    final["val_images"] = len(splits["val"])
    if test:
        final |= {f"test_{name}": value for name, value in task.figures(test).items()} | {"test_images": test.images}
    final |= {"backend": parts.backend, "seconds": round(seconds, 3)}
    run.log(final, progress.metrics_bytes)
    if progress.best:
        chosen = task.describe(progress.best, len(splits["val"]))
        step = f", step {progress.best_step:,}" if parts.config.val_steps else ""
        say(f"kept epoch {progress.best_epoch}{step}: {chosen} on {len(splits['val']):,} validation images")


def draw_final(
    run: Run, parts: Parts, task: Task, test: Evaluation | None, model: Any, between: Callable[[], None]
) -> None:
    """The pictures of a training; `between` is called before each. model: the kept one, where it was tested with the
    figures `test`."""
    from ..viz import curves, phases

    between()
    curves(run.read_metrics(), *run.pictures("curves"), metric=task.metric, name=task.metric_name)
    between()
    phases(run.read_metrics(), *run.pictures("phases"))
    if test:
        between()
        samples = parts.source.splits["test"]
        task.picture(test, parts.source.class_names, run.pictures(task.picture_name), model, samples)
