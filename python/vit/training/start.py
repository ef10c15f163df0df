"""vit.training.train: which run, with which options, goes through the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data import is_built_in, recipe_of
from ..support.extras import require
from . import resume as resuming
from . import trackers
from .config import TrainConfig
from .evaluate import cpu_threads
from .loop import Training
from .progress import Display, Silent
from .report import TrainResult
from .run import Run, is_free, new_path


def train(
    config: TrainConfig | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    display: Display | None = None,
    changes: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains a model as `config` says into a new run folder, or goes on with the run folder `resume`.

    resume="auto" goes on with the folder `out` if it holds a run, and starts one there if not. changes: options of the
    resumed run by name that are to have other values from here on (see vit.training.resume.FREE).

    The kept weights are those of the epoch with the best validation accuracy (of equal ones the smaller
    loss), or the last ones without validation images; the test images are looked at once, at the end. Raises
    ValueError for options and data that do not fit and for a folder in use, Interrupted after a signal, TrainError when
    the gradients stop being finite or a process that reads images dies, OSError when a checkpoint cannot be written.
    """
    for module in ("accelerate", "yaml", "matplotlib"):  # missing at the end would cost the whole training
        require(module, "train")
    if resume == "auto":
        if out is None:
            raise ValueError("vit: --resume auto needs --out: the folder to go on with, or to start")
        resume = None if is_free(Path(out)) else out
    run = Run.open(resume) if resume is not None else None
    if run and not (config and run.is_unstarted()):  # else nothing has come of the options it has
        config = resuming.changed(run, _absolute(changes or {}))
    config = config or TrainConfig()
    paths = _absolute({"data": config.data, "teacher": config.teacher})
    config = dataclasses.replace(config, **paths).resolved(recipe_of(config.data))
    trackers.check(config.logger)
    name = Path(config.data).name
    others = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
    if not run and not others:  # which may come later, when the first process has made the folder
        new_path(out, name)  # a folder in use is refused before the data are read
    with cpu_threads(0):  # puts back what accelerate or this training sets
        return Training(config, run, out, name, display or Silent()).run_all()


def _absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options with paths of data and teacher from the root: a run goes on from any folder."""
    found = dict(values)
    data, teacher = found.get("data"), found.get("teacher")
    if data is not None and not is_built_in(data):
        found["data"] = str(Path(data).expanduser().resolve())
    if teacher is not None and (path := Path(teacher).expanduser()).exists():
        found["teacher"] = str(path.resolve())
    return found
