"""The state of a training in one safetensors file: tensors, and everything else as JSON in its header. No
pickle.

Random numbers need no state: each is a function of the seed and of the epoch, step or image it is for.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..support.files import write_tensors
from .optim import Average

FORMAT = 1


@dataclass
class Progress:
    """How far a training is. `step` optimizer steps of epoch `epoch` (counted from 0) are done."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0  # over this epoch's steps
    norm_sum: float = 0.0  # of the gradients, over this epoch's steps
    skipped: int = 0  # steps of this epoch left out for a gradient that was not finite
    skipped_in_a_row: int = 0
    best_accuracy: float = -1.0
    best_loss: float = float("inf")
    best_epoch: int = 0
    metrics_bytes: int = 0
    seconds: float = 0.0


def save(
    path: Path,
    progress: Progress,
    facts: dict[str, Any],
    model: nn.Module,
    average: Average | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Replaces the checkpoint; OSError when it cannot be written, and then the previous one is still there.

    facts: what must be the same for the training to go on (see `load`)
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if average:
        tensors |= {f"average.{name}": tensor for name, tensor in average.model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    header = {"format": FORMAT, "progress": asdict(progress), "facts": facts}
    write_tensors(path, tensors, {"vit": json.dumps(header)})


def load(path: Path) -> tuple[Progress, dict[str, Any], dict[str, Tensor]]:
    """Progress, facts and tensors of a checkpoint; ValueError when the file is damaged or of another
    version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["vit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise ValueError(f"vit: there is no {path.name} in {path.parent}; nothing to resume") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"vit: {path} is not a checkpoint of vit train, or damaged: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"vit: {path} has format {header.get('format')}; this version of vit reads {FORMAT}")
    return Progress(**header["progress"]), header["facts"], tensors


def restore(
    tensors: dict[str, Tensor], model: nn.Module, average: Average | None, optimizer: torch.optim.Optimizer
) -> None:
    """Puts the tensors of a checkpoint back into place."""
    model.load_state_dict(_below(tensors, "model."))
    if average:
        average.model.load_state_dict(_below(tensors, "average."))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below(tensors, "optimizer.").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
