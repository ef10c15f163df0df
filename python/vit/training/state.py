"""The state of a training in one safetensors file: tensors with checksums, and everything else as JSON in its header.
No pickle.

Random numbers need no state: each is a function of the seed and of the epoch, step or image it is for.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..support.records import Record, RecordError
from ..support.tensors import DamagedFile, read_tensors, write_tensors
from .optim import Average, counted, expected_state
from .sharded import gathered

FORMAT = 2


@dataclass
class Progress:
    """How far a training is. `step` optimizer steps of epoch `epoch` (counted from 0) are done."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0  # over this epoch's steps
    norm_sum: float = 0.0  # of the gradients, over this epoch's steps
    monitor_sums: list[float] = field(
        default_factory=list
    )  # of the task's `monitored` figures, over this epoch's steps
    skipped: int = 0  # steps of this epoch left out for a gradient that was not finite
    skipped_in_a_row: int = 0
    loss_mean: float = 0.0  # of the steps taken so far, the last ones counting most; 0 before the first
    loss_scale: float = 65536.0  # of --amp fp16, and the steps since it changed or overflowed
    scaled_steps: int = 0
    best_epoch: int = 0  # 0: none yet
    best_step: int = 0  # the step whose weights these were
    best: dict[str, float] = field(default_factory=dict)  # validation figures of that step
    validated: int = 0  # the step of the last validation within an epoch
    metrics_bytes: int = 0
    seconds: float = 0.0

    @classmethod
    def read(cls, record: Record) -> Progress:
        """The progress in a checkpoint's header; RecordError names a field that is missing, unknown or out of range."""
        best = record.record("best")
        epoch = record.integer("epoch", low=0)
        progress = cls(
            epoch=epoch,
            step=(step := record.integer("step", low=0)),
            loss_sum=record.number("loss_sum"),
            norm_sum=record.number("norm_sum", low=0.0),
            monitor_sums=list(record.numbers("monitor_sums")),
            skipped=record.integer("skipped", low=0, high=step),
            skipped_in_a_row=record.integer("skipped_in_a_row", low=0),
            loss_mean=record.number("loss_mean", 0.0),
            loss_scale=record.number("loss_scale", 65536.0, low=1.0),
            scaled_steps=record.integer("scaled_steps", 0, low=0),
            best_epoch=record.integer("best_epoch", low=0, high=epoch + 1),
            # A loss that was not finite is null in JSON.
            best={key: math.inf if best.raw(key) is None else best.number(key) for key in best.values},
            best_step=record.integer("best_step", 0, low=0),
            validated=record.integer("validated", 0, low=0),
            metrics_bytes=record.integer("metrics_bytes", low=0),
            seconds=record.number("seconds", low=0.0),
        )
        record.finish()
        if bool(progress.best) and not progress.best_epoch:
            raise RecordError(f"vit: {record.source}: best has figures, but best_epoch is 0")
        return progress


def collect(model: nn.Module, average: Average | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a checkpoint, all whole: of a sharded model every process must ask for them."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if average:
        tensors |= {f"average.{name}": tensor for name, tensor in average.model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    tensors |= {f"steps.{index}": count for index, count in counted(optimizer).items()}
    return gathered(tensors)


def save(path: Path, progress: Progress, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Replaces the checkpoint; OSError when it cannot be written, and then the previous one is still there.

    facts: what must be the same for the training to go on (see `vit.training.resume`)
    """
    header = {"format": FORMAT, "progress": asdict(progress), "facts": facts}
    write_tensors(path, tensors, header)


def load(path: Path) -> tuple[Progress, Record, dict[str, Tensor]]:
    """Progress, facts and tensors of a checkpoint; ValueError when a bit of the file is not what was written, or it is
    of another version."""
    if not path.is_file():
        raise ValueError(f"vit: there is no {path.name} in {path.parent}; nothing to resume")
    try:
        about, tensors = read_tensors(path)
    except (DamagedFile, RecordError) as error:
        text = str(error).removeprefix("vit: ")
        raise ValueError(f"vit: {path} is not a checkpoint of vit train, or damaged: {text}") from error
    header = Record(about, f"the header of {path}")
    if (version := header.raw("format", None)) != FORMAT:
        raise ValueError(f"vit: {path} has format {version}; this version of vit reads {FORMAT}")
    return Progress.read(header.record("progress")), header.record("facts"), tensors


def restore(
    path: Path,
    tensors: dict[str, Tensor],
    model: nn.Module,
    average: Average | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Puts the tensors of a checkpoint back into place; ValueError names those that are missing, too many or of another
    shape or dtype than this training's."""
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if average:
        expected |= {f"average.{name}": tensor for name, tensor in average.model.state_dict().items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    started = {name.split(".")[1] for name in tensors if name.startswith("optimizer.")}
    for index, parameter in enumerate(parameters):
        if str(index) in started:  # AdamW has no state before a parameter's first gradient
            likes = expected_state(optimizer, parameter)
            expected |= {f"optimizer.{index}.{key}": like for key, like in likes.items()}
    steps = _below(tensors, "steps.")
    if type(optimizer).__name__ == "Lamb" and started:  # which counts in its groups
        expected |= {f"steps.{i}": torch.zeros(()) for i in range(len(optimizer.param_groups))}
    for problem, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("also holds", tensors.keys() - expected.keys()),
        (
            "has another shape or dtype of",
            {n for n, t in tensors.items() if n in expected and not _like(t, expected[n])},
        ),
    ):
        if names:
            some = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(f"vit: {path} does not fit this training: it {problem} {some}")
    model.load_state_dict(_below(tensors, "model."))
    if average:
        average.model.load_state_dict(_below(tensors, "average."))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below(tensors, "optimizer.").items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    for number, count in steps.items():
        groups[int(number)]["step"] = count
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _like(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and tensor.dtype == other.dtype


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
