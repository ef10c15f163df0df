"""What a training that goes on must share with the one that was interrupted, and what may change."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..backends import get
from ..support.files import to_json
from ..support.records import Record, shown
from ..support.tensors import DamagedFile, read_tensors
from .assembly import Parts
from .config import FIELDS, TrainConfig, flag
from .run import Run
from .state import Progress

#: Options that change nothing of what is done already. `data`: the same images at another place. `epochs`: the steps to
#: come follow the cosine of the new length.
FREE = (
    "data", "backend", "epochs", "workers", "threads", "bad_images", "validate", "checkpoint_seconds", "log_seconds",
    "figures", "keep", "logger",
)  # fmt: skip


class RefusedChange(ValueError):
    """An option that would change what a run has done already; the text names it and those that may change."""


def changed(run: Run, given: Mapping[str, Any]) -> TrainConfig:
    """The run's configuration with the options `given` in the place of its own.

    Options that the run has already may be repeated, and a run that was ended before its first step takes all. Raises
    RefusedChange for other values of those not in FREE.
    """
    different = {
        name: value for name, value in given.items() if value is not None and value != getattr(run.config, name)
    }
    refused = [name for name in different if name not in FREE and not run.is_unstarted()]
    if refused:
        values = ", ".join(
            f"{flag(name)} {shown(different[name])} (the run has {shown(getattr(run.config, name))})"
            for name in refused
        )
        raise RefusedChange(
            f"vit: {values} would change what {run.path} has already done; leave out "
            f"{', '.join(map(flag, sorted(refused)))}, or start a new run. "
            f"A run that goes on takes {', '.join(map(flag, FREE))}"
        )
    return dataclasses.replace(run.config, **different)


def facts(config: TrainConfig, fingerprint: str, parts: Parts, accelerator: Any) -> dict[str, Any]:
    """What a checkpoint says of its training: `data`, `processes`, `options`, `model` and `teacher` must be the same
    for it to go on, `machine` should for equal bits."""
    from ..version import __version__

    return {
        "data": fingerprint,
        "processes": accelerator.num_processes,
        "options": {name: getattr(config, name) for name in FIELDS if name not in FREE},
        "model": parts.info,
        "teacher": parts.teacher.digest() if parts.teacher else None,
        "machine": {
            "backend": parts.model.plan,
            "device": str(accelerator.device.type),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "vit": __version__,
            "cpu": platform.machine(),
            "isa": get("cpu").info().get("isa"),  # not vit.backends(): that loads every backend
        },
    }


def check(run: Run, config: TrainConfig, progress: Progress, steps: int, saved: Record, now: dict[str, Any]) -> None:
    """ValueError where the run folder, the data or the processes are not those of the checkpoint."""
    for key, file in (("options", "config.yaml"), ("model", "model.json")):
        before, after = dict(saved.record(key).values), json.loads(to_json(now[key]))
        if key == "options":  # an option that is newer than the run had its default
            before = {
                name: option.default for name, option in FIELDS.items() if name in after and name != "arch"
            } | before
        if names := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
            raise ValueError(
                f"vit: {run.path / file} is not what {run.checkpoint.name} was written with: {names[0]} was "
                f"{shown(before.get(names[0]))}, now it is {shown(after.get(names[0]))}; put it back or start a new run"
            )
    saved.text("data")
    if saved.raw("data") != now["data"]:
        raise ValueError(
            f"vit: {config.data} is not the data {run.path} was trained on: images, labels or classes "
            "have changed since; start a new run"
        )
    if saved.raw("teacher", None) != now["teacher"]:
        raise ValueError(f"vit: --teacher {config.teacher}: its weights have changed since; put them back")
    if saved.integer("processes", low=1) != now["processes"]:
        raise ValueError(
            f"vit: {run.path} was trained by {saved.raw('processes')} process(es), not {now['processes']}; "
            "resume it with the same number"
        )
    if progress.epoch > (config.epochs or 0):
        raise RefusedChange(
            f"vit: {run.path} has done {progress.epoch} epochs, more than --epochs {config.epochs}; give that many"
        )
    for name, most in (("step", steps), ("skipped", progress.step)):
        if getattr(progress, name) > most:
            raise ValueError(f"vit: {run.checkpoint} is damaged: {name} is {getattr(progress, name)}, above {most}")
    if run.metrics_bytes() < progress.metrics_bytes:
        raise ValueError(
            f"vit: {run.metrics} is missing or shorter than when {run.checkpoint.name} was written; "
            "put it back or start a new run"
        )
    run.read_metrics(progress.metrics_bytes)  # a damaged line is named now, not when the curves are drawn
    if progress.best_epoch and not run.weights.is_file():
        raise ValueError(f"vit: {run.weights} is missing, the weights of epoch {progress.best_epoch}; put it back")
    if progress.best_epoch:
        try:
            read_tensors(run.weights, required=True)  # damage is named now, not by the test after the last epoch
        except DamagedFile as error:
            raise ValueError(f"{error}; put it back or start a new run") from error


def report_machine(saved: Record, now: dict[str, Any], report: Callable[[str], None]) -> None:
    """Names what is different from the machine of the checkpoint."""
    machine = saved.record("machine").values
    different = [
        f"{key} {json.dumps(old)} -> {json.dumps(now['machine'].get(key))}"
        for key, old in machine.items()
        if old != now["machine"].get(key)
    ]
    if different:
        report(f"resumed elsewhere, so the last bits may differ: {', '.join(different)}")


def report_changes(run: Run, config: TrainConfig, report: Callable[[str], None]) -> None:
    """Names the options that are not the run's own any more, and what new epochs do to the learning rate."""
    for name in FREE:
        old, new = getattr(run.config, name), getattr(config, name)
        if old != new:
            note = "; the steps to come follow the learning rates of the new length" if name == "epochs" else ""
            report(f"{flag(name)} {old} -> {new}{note}")
