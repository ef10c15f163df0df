"""Reading weights without ever executing them: safetensors, NumPy archives, tensors-only pickles, folders,
the hub."""

from __future__ import annotations

import difflib
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import jax, torchvision, transformers
from .checkpoint import Checkpoint, WeightsError

HUB = "hf-hub:"
SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")

#: Names under which training programs keep the state dict inside their checkpoint.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

#: What wrappers such as DistributedDataParallel and torch.compile put before parameter names.
PREFIXES = ("module.", "_orig_mod.")


def load(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file, folder or hub repository, under timm's parameter names.

    Raises FileNotFoundError when there is none, WeightsError when it cannot be read safely.
    """
    return dict(read(source).state)


def read(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Checkpoint:
    """Everything a source of weights says; a mapping is taken as a state dict. Raises as `load`."""
    if isinstance(source, Mapping):
        return _checkpoint(source, "the given state dict")
    if isinstance(source, str) and source.startswith(HUB):
        return _read_hub(source.removeprefix(HUB))
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"vit: weights {str(path)!r} do not exist{_similar_files(path)}")
    return _checkpoint(read_file(path), str(path))


def read_file(path: Path) -> Mapping[str, Any]:
    """The tensors of one file by name; WeightsError when it is truncated, unknown or would execute code."""
    readers = {".safetensors": _read_safetensors, ".npz": jax.read_npz}
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"vit: weights {str(path)!r}: the suffix is not one of {', '.join(SUFFIXES)}")
    try:
        return readers.get(path.suffix, _read_pickle)(path)
    except (SafetensorError, zipfile.BadZipFile, EOFError, ValueError) as error:
        raise WeightsError(
            f"vit: weights {str(path)!r} ({path.stat().st_size} bytes) are truncated or not a "
            f"{path.suffix} file: {error}"
        ) from error


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    return load_file(path)


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "truncated" in str(error) or "invalid load key" in str(error):
            raise ValueError(error) from error
        raise WeightsError(
            f"vit: weights {str(path)!r} hold more than tensors, and reading them would execute code "
            "stored in the "
            "file: refused. If you trust it, load it yourself and save the tensors alone: "
            "safetensors.torch.save_file(torch.load(path, weights_only=False).state_dict(), "
            "'weights.safetensors')"
        ) from error
    except RuntimeError as error:  # torch's word for a broken zip archive
        raise ValueError(error) from error


def _read_folder(folder: Path) -> Checkpoint:
    """A run folder of `vit train` (model.json, best.safetensors) or a folder with model.safetensors and
    config.json."""
    if (folder / "model.json").exists():
        record = _read_json(folder / "model.json")
        weights = folder / "best.safetensors"
        if not weights.exists():
            raise FileNotFoundError(
                f"vit: run {str(folder)!r} has no best.safetensors: its training never finished an epoch"
            )
        return _checkpoint(
            read_file(weights),
            str(weights),
            name=record.get("name"),
            arch=record.get("arch", {}),
            preprocess=record.get("preprocess"),
            class_names=tuple(record.get("class_names") or ()) or None,
        )
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (folder / file).exists():
            config = _read_json(folder / "config.json") if (folder / "config.json").exists() else {}
            return _checkpoint(read_file(folder / file), str(folder / file), **_hub_config(config))
    raise FileNotFoundError(
        f"vit: folder {str(folder)!r} holds neither a run (model.json) nor model.safetensors; pass the "
        "weights file itself"
    )


def _read_hub(repository: str) -> Checkpoint:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"vit: weights '{HUB}{repository}' need huggingface_hub; run: pip install huggingface_hub"
        ) from error
    try:
        folder = snapshot_download(repository, allow_patterns=["model.safetensors", "config.json"])
    except Exception as error:  # the hub has a dozen kinds: no network, no such repository, no permission
        raise WeightsError(f"vit: weights '{HUB}{repository}' cannot be fetched: {error}") from error
    return _read_folder(Path(folder))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"vit: {str(path)!r} is not JSON: {error}") from error


def _hub_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json as published beside timm's weights says about the model; nothing for other ones."""
    pretrained = config.get("pretrained_cfg") or {}
    keys = ("mean", "std", "interpolation", "crop_pct")
    preprocess = {key: pretrained[key] for key in keys if key in pretrained}
    return {"name": config.get("architecture"), "preprocess": preprocess or None}


def _checkpoint(found: Mapping[str, Any], source: str, **about: Any) -> Checkpoint:
    """Unwraps, recognises the layout, converts the names."""
    for wrapper in WRAPPERS:
        if isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
            break
    state = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    for layout in (jax, transformers, torchvision):
        if layout.recognises(state):
            state = layout.convert(state)
    if not state:
        raise WeightsError(
            f"vit: {source} holds no tensors; its keys are {', '.join(map(str, list(found)[:8]))}"
        )
    checkpoint = Checkpoint(state, source, **about)
    if not checkpoint.arch:
        checkpoint = Checkpoint(state, source, **(about | {"arch": checkpoint.sizes()}))
    return checkpoint


def _similar_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {str(path.parent)!r}"
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=3)
    return f"; nearest in its folder: {', '.join(near)}" if near else ""
