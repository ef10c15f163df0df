"""The run folder: everything one training leaves behind, and enough to evaluate it, use it and go on with it.

config.yaml         every option, with the recipe's values filled in
model.json          name, arguments of vit.create, class names, preprocessing
run.json            commands, versions, host, times, the digest of config.yaml
best.safetensors    the weights kept: best validation accuracy
last.safetensors    the weights of the last epoch
epoch-N.safetensors the weights of the --keep best epochs, where these are more than one
metrics.jsonl       one line per epoch, then one with the test figures; raw values
checkpoint.safetensors   the whole state of the training, for --resume
curves.png, phases.png, confusion.png   pictures of metrics.jsonl and of the test images
tensorboard/        with --logger tensorboard
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import tasks
from ..data import DataError, Samples, Source, open_source
from ..factory import create
from ..preprocess import Preprocess
from ..support.files import append_line, is_leftover, refuse_link, remove_leftovers, to_json, write_text
from ..support.lock import NAME as LOCK
from ..support.lock import FolderLock
from ..support.records import Record, parse_json, read_regular
from ..support.tensors import read_tensors, write_tensors
from .config import TrainConfig, from_mapping, read_yaml
from .evaluate import Evaluation, cpu_threads, evaluate

#: Options that say which images are the test images; the default in the place of a lost one could mix in others.
_NEEDED = ("data", "val_fraction", "test_fraction", "split_seed")

#: What Run.create writes, and what of it makes a folder a run.
_WRITTEN = frozenset(["model.json", "metrics.jsonl", "config.yaml"])
_RUN = frozenset(["model.json", "config.yaml"])


@dataclass(frozen=True)
class Run:
    """A run folder: its path, the resolved configuration and the content of model.json."""

    path: Path
    config: TrainConfig
    model: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def weights(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def last_weights(self) -> Path:
        return self.path / "last.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @classmethod
    def create(cls, path: Path, config: TrainConfig, model: dict[str, Any]) -> Run:
        """Makes the folder, where there is none, and writes model.json and, last, config.yaml, which makes it a run.
        Where that fails, on a full disk, nothing of them is left."""
        run = cls(path, config, model)
        path.mkdir(parents=True, exist_ok=True)
        texts = {"model.json": to_json(model, indent=2) + "\n", run.metrics.name: "", "config.yaml": config.to_yaml()}
        try:
            for name, text in texts.items():
                write_text(path / name, text)
        except BaseException:
            for name in texts:
                (path / name).unlink(missing_ok=True)
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in an existing folder; ValueError when files are missing or damaged."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"vit: {path} is not a run folder: no such folder")
        for name in ("config.yaml", "model.json"):
            if not (path / name).is_file():
                raise ValueError(f"vit: {path} is not a run folder of vit train: it has no {name}{_begin_there(path)}")
        options = read_yaml(path / "config.yaml")
        if missing := [name for name in _NEEDED if name not in options]:
            raise ValueError(f"vit: {path / 'config.yaml'} is damaged: it lacks {', '.join(missing)}")
        config = from_mapping(options, str(path / "config.yaml"))
        try:
            record = Record.read(path / "model.json")
            model = {
                "name": record.text("name"),
                "arch": dict(record.record("arch").values),
                "class_names": list(record.texts("class_names")),
                "preprocess": dict(record.record("preprocess").values),
            }
            Preprocess.from_dict(model["preprocess"])
        except ValueError as error:
            text = str(error).removeprefix("vit: ")
            raise ValueError(f"vit: {path / 'model.json'} is damaged: {text}") from error
        return cls(path, config, model)

    def epoch_weights(self, epoch: int) -> Path:
        """The file of an epoch's weights, where several are kept."""
        return self.path / f"epoch-{epoch}.safetensors"

    def is_unstarted(self) -> bool:
        """Whether the run was ended before its first checkpoint: it starts anew, with nothing lost."""
        return not (self.checkpoint.exists() or self.weights.exists() or self.metrics_bytes())

    def edited(self) -> bool:
        """Whether config.yaml is not the one that the last session noted in run.json."""
        try:
            sessions = Record.read(self.path / "run.json").raw("sessions")
            noted = Record(sessions[-1], "run.json").text("config_sha256")
        except (OSError, ValueError, LookupError, TypeError):  # no record: of an earlier version, or damaged
            return False
        return bool(noted != hashlib.sha256(read_regular(self.path / "config.yaml")).hexdigest())

    def lock(self) -> FolderLock:
        """Owns the folder for a training. FolderInUse if another one does, OSError for a link in place of a file."""
        lock = FolderLock(self.path)
        try:
            for entry in self.path.iterdir():
                if entry.is_symlink() and not is_leftover(entry):
                    refuse_link(entry)
            remove_leftovers(self.path)
        except BaseException:
            lock.close()
            raise
        return lock

    def source(self, data: str | None = None) -> Source:
        """The run's data, or other `data` with images of its classes or some of them, as they were found."""
        config, names = self.config, self.model["class_names"]
        source = open_source(data or config.data, config.bad_images, config.validate, classes=names if data else None)
        if list(source.class_names) != names:
            text = f"has the classes {list(source.class_names)}, {self.path} was trained on {names}"
            raise DataError(f"vit: {config.data} {text}")
        return source

    def samples(self, split: str | None, data: str | None) -> Samples:
        """One split ("train", "val", "test", "all") of the run's data or of other `data`.

        None means "test" for the run's own data and "all" for other data.
        """
        config, split = self.config, split or ("all" if data else "test")
        return self.source(data).select(split, config.val_fraction, config.test_fraction, config.split_seed)

    def load(self, backend: str | None = None) -> Any:
        """The kept model, planned for inference."""
        if not self.weights.is_file():
            raise ValueError(f"vit: {self.path} has no {self.weights.name} yet: no epoch was finished")
        read_tensors(self.weights, required=True)
        return create(weights=self.path, backend=backend or self.config.backend, training=False)

    def evaluate(
        self,
        split: str | None = None,
        data: str | None = None,
        backend: str | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> Evaluation:
        """Accuracy and loss of the kept model; the defaults repeat what the training logged, to the last
        bit."""
        samples = self.samples(split, data)
        workers = self.config.workers if workers is None else workers
        with cpu_threads(self.config.threads):
            task = tasks.get(self.config.task)
            return evaluate(self.load(backend), samples, batch_size or self.config.batch_size or 1, workers, task=task)

    def with_config(self, config: TrainConfig) -> Run:
        """The run with another config.yaml, written."""
        write_text(self.path / "config.yaml", config.to_yaml())
        return replace(self, config=config)

    def pictures(self, name: str) -> list[Path]:
        """The files of a picture: PNG, and the format of --figures if that is another."""
        return [self.path / f"{name}.{suffix}" for suffix in dict.fromkeys(("png", self.config.figures))]

    def save_weights(self, state: dict[str, Any], path: Path | None = None) -> None:
        """Replaces best.safetensors (or `path`); OSError when it cannot be written."""
        write_tensors(path or self.weights, state)

    def log(self, values: dict[str, Any], offset: int) -> int:
        """Writes one line of metrics.jsonl at `offset`; returns the offset behind it."""
        return append_line(self.metrics, to_json(values), offset)

    def metrics_bytes(self) -> int:
        """The length of metrics.jsonl; 0 without the file."""
        return self.metrics.stat().st_size if self.metrics.is_file() else 0

    def read_metrics(self, size: int | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, or those in its first `size` bytes."""
        lines = read_regular(self.metrics)[:size].splitlines()
        return [
            dict(Record(parse_json(line, where := f"{self.metrics}, line {number}"), where).values)
            for number, line in enumerate(lines, 1)
        ]


def way_out(run: Run) -> str:
    """How to go on with a run that stopped; nothing where it has lost its checkpoint."""
    can_go_on = run.checkpoint.is_file() or run.is_unstarted()
    return f"go on with: vit train --resume {run.path}" if can_go_on else ""


def is_free(path: Path) -> bool:
    """Whether a new run may go to `path`: there is nothing, or an empty folder. What a killed start has left in it (a
    lock, temporary files, some of the files that Run.create writes, but not all) does not count."""
    if not os.path.lexists(path):
        return True
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir() if not is_leftover(entry)}
    if LOCK not in names:  # files that no start has written are the user's
        return not names
    begun, metrics = names - {LOCK}, path / "metrics.jsonl"
    return begun <= _WRITTEN and not begun >= _RUN and not (metrics.exists() and metrics.stat().st_size)


def _begin_there(path: Path) -> str:
    """The way out for a folder that a killed start has left; nothing for others."""
    if not ((path / LOCK).exists() and is_free(path)):
        return ""
    return f"; a start that was ended before the run began has left it so: vit train --out {path} starts one there"


def new_path(out: str | Path | None, data: str) -> Path:
    """Where a new run goes: `out` if it is free, else runs/<data>-<n> with the next free number."""
    if out is not None:
        path = Path(out)
        if not is_free(path):
            raise ValueError(
                f"vit: {path} exists already; go on with it (vit train --resume {path}) or give another --out"
            )
        return path
    number = 1
    while os.path.lexists(path := Path("runs") / f"{data}-{number}"):
        number += 1
    return path


def new_folder(out: str | Path | None, data: str) -> Path:
    """Makes the folder that new_path names; of trainings that start at the same time each gets its own."""
    while True:
        path = new_path(out, data)
        try:
            path.mkdir(parents=True, exist_ok=out is not None)
            return path
        except FileExistsError:  # another training has just taken this number
            continue
