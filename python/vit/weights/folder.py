"""Weights with records beside them: run folders, folders of timm and transformers, repositories of the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..support.records import Record, RecordError
from ..support.text import printable
from . import open_clip_config, records, timm_config, transformers_processor, transformers_records
from .checkpoint import Checkpoint, WeightsError, some
from .file import SUFFIXES, checkpoint_of, read_file, shown

HUB = "hf-hub:"

#: The names under which timm and transformers save weights, the safer first; an index names the parts of large ones.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: What open_clip saves, beside its own record.
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPEN_CLIP_RECORD = "open_clip_config.json"
#: Files of a run of `vit train`: the weights to take, those of the last epoch, the state for --resume.
BEST, LAST, STATE = "best.safetensors", "last.safetensors", "checkpoint.safetensors"
RECORDS = ("config.json", "preprocessor_config.json", OPEN_CLIP_RECORD)


def read_folder(folder: Path) -> Checkpoint:
    """A run folder of `vit train` (model.json, best.safetensors) or a folder with model.safetensors and
    config.json. Raises WeightsError naming file and key for a record that says what it cannot mean."""
    try:
        if (folder / "model.json").exists():
            return _read_run(folder, folder / BEST)
        return _read_published(folder)
    except RecordError as error:
        raise WeightsError(str(error)) from error


def is_of_run(path: Path) -> bool:
    """Whether a file is the weights of a run, beside its model.json."""
    named = path.name in (BEST, LAST, STATE) or re.fullmatch(r"epoch-\d+\.safetensors", path.name)
    return bool(named) and (path.parent / "model.json").is_file()


def read_file_of_run(path: Path) -> Checkpoint:
    """Weights of a run, with what its model.json says. Raises WeightsError as read_folder, and for its state."""
    if path.name == STATE:
        raise WeightsError(
            f"vit: {shown(path)} is the state of a training, for vit train --resume; its weights are the folder, "
            f"or {BEST} and {LAST} in it"
        )
    try:
        return _read_run(path.parent, path)
    except RecordError as error:
        raise WeightsError(str(error)) from error


def _read_run(folder: Path, weights: Path) -> Checkpoint:
    record = Record.read(folder / "model.json")
    about = records.run(record)
    if not weights.exists():
        raise FileNotFoundError(
            f"vit: run {str(folder)!r} has no best.safetensors: its training never finished an epoch"
        )
    return checkpoint_of(read_file(weights), shown(weights), **about)


def _read_published(folder: Path) -> Checkpoint:
    file = next((folder / name for name in (*FILES, *OPEN_CLIP) if (folder / name).exists()), None)
    if file is None:
        others = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(SUFFIXES))
        raise FileNotFoundError(
            f"vit: folder {str(folder)!r} holds neither a run (model.json) nor model.safetensors; "
            "pass the weights file itself" + (f": {printable(some(others, 5))}" if others else "")
        )
    about = _about_clip(folder) if file.name in OPEN_CLIP else _about(folder)
    return checkpoint_of(_read_parts(file) if file.suffix == ".json" else read_file(file), shown(file), **about)


def _about(folder: Path) -> dict[str, Any]:
    """What the records beside the weights say of their model."""
    if not (folder / "config.json").exists():
        return {}
    record = Record.read(folder / "config.json")
    if record.raw("architecture", None) is not None or record.raw("model_type", None) in (None, "timm_wrapper"):
        return timm_config.about(record)
    about = transformers_records.about(record)
    about["preprocess"] = transformers_processor.preprocess(folder / "preprocessor_config.json")
    return about


def _about_clip(folder: Path) -> dict[str, Any]:
    """The same of open_clip's."""
    path = folder / OPEN_CLIP_RECORD
    return open_clip_config.about(Record.read(path)) if path.exists() else {}


def _read_parts(index: Path) -> Mapping[str, Any]:
    """The tensors of a checkpoint in several files, as its index lists them."""
    table = Record.read(index).record("weight_map")
    found: dict[str, Any] = {}
    for name in dict.fromkeys(table.text(key) for key in table.values):
        if name != Path(name).name or name in ("", ".", ".."):
            table.refuse(next(key for key in table.values if table.values[key] == name), "a file of the same folder")
        part = index.parent / name
        if not part.exists():
            raise FileNotFoundError(f"vit: {str(part)!r}, which {index.name} lists, does not exist")
        found |= {key: value for key, value in read_file(part).items() if table.values.get(key) == name}
    if missing := [key for key in table.values if key not in found]:
        raise WeightsError(f"vit: {shown(index)} lists {printable(some(missing))}, which its files do not hold")
    return found


def read_hub(repository: str) -> Checkpoint:
    """A repository of the hub, `organisation/name` or `organisation/name@revision`."""
    repository, _, revision = repository.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise WeightsError(f"vit: weights '{HUB}{printable(repository)}' is not {HUB}organisation/name[@revision]")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"vit: weights '{HUB}{repository}' need huggingface_hub; run: pip install huggingface_hub"
        ) from error

    def fetch(*files: str) -> Path:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*files, *RECORDS]))

    try:
        folder = fetch("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
        if not any((folder / name).exists() for name in FILES):
            folder = fetch("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
        for name in OPEN_CLIP:
            if not any((folder / file).exists() for file in (*FILES, *OPEN_CLIP)):
                folder = fetch(name)
    except Exception as error:  # the hub has a dozen kinds: no network, no such repository, no permission
        at = f"@{revision}" if revision else ""
        raise WeightsError(
            f"vit: weights '{HUB}{repository}{at}' cannot be fetched: {error}\nWithout a network, pass a folder with "
            "model.safetensors and config.json of that repository, or the file alone"
        ) from error
    return read_folder(folder)
