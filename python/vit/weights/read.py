"""Reading weights without ever executing them: safetensors, NumPy archives, tensors-only pickles, folders,
the hub."""

from __future__ import annotations

import difflib
import json
import logging
import os
import pickle
import pickletools
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from . import jax, torchvision, transformers
from .checkpoint import Checkpoint, WeightsError, all_finite, some

log = logging.getLogger("vit")

HUB = "hf-hub:"
SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")

#: Names under which training programs keep the state dict inside their checkpoint.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

#: What wrappers such as DistributedDataParallel and torch.compile put before parameter names.
PREFIXES = ("module.", "_orig_mod.")


def load(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file, folder or hub repository, under timm's parameter names. Raises as `read`."""
    return dict(read(source).state)


def read(source: str | os.PathLike[str] | Mapping[str, Tensor] | Checkpoint, non_finite: str = "error") -> Checkpoint:
    """Everything a source of weights says; a mapping is taken as a state dict.

    non_finite: whether NaN and infinities are an "error" or make a "warn"-ing that names their parameters.
    Raises FileNotFoundError when there is no such file, WeightsError when it cannot be read safely.
    """
    if isinstance(source, Checkpoint):
        return source
    checkpoint = _read(source)
    check_finite(checkpoint, non_finite)
    return checkpoint


def _read(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Checkpoint:
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


def check_finite(checkpoint: Checkpoint, non_finite: str) -> None:
    """Names the parameters that hold NaN or infinities, as WeightsError or as a log warning."""
    if non_finite not in ("error", "warn"):
        raise ValueError(f"vit: non_finite={non_finite!r} is not one of 'error', 'warn'")
    floating = {key: value for key, value in checkpoint.state.items() if value.is_floating_point()}
    bad = [key for key, value in floating.items() if not all_finite(value)]
    if not bad:
        return
    text = f"{checkpoint.source}: NaN or infinite values in {some(bad)}"
    if non_finite == "error":
        raise WeightsError(
            f"vit: {text}. Take a checkpoint from before the training diverged; to load this one all the same, "
            "pass weights=vit.weights.read(source, non_finite='warn')"
        )
    log.warning(text)


def read_file(path: Path) -> Mapping[str, Any]:
    """The tensors of one file by name; WeightsError when it is truncated, unknown or would execute code."""
    readers: dict[str, Callable[[Path], Mapping[str, Any]]] = {".safetensors": load_file, ".npz": jax.read_npz}
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"vit: weights {str(path)!r}: the suffix is not one of {', '.join(SUFFIXES)}")
    try:
        return readers.get(path.suffix, _read_pickle)(path)
    except (WeightsError, PermissionError):
        raise
    except Exception as error:  # a broken file makes each reader stumble in half a dozen ways
        raise WeightsError(
            f"vit: weights {str(path)!r} ({path.stat().st_size} bytes) are truncated or not a {path.suffix} "
            f"file: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():  # about what is refused below anyway
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if not (names or "TorchScript" in str(error) or _is_whole_pickle(path)):
            raise  # not a question of trust: broken
        called = f" ({', '.join(dict.fromkeys(names))})" if names else ""
        raise WeightsError(
            f"vit: weights {str(path)!r} hold more than tensors, and reading them would execute code the file "
            f"names{called}: refused. If you trust it, save its tensors alone and use that file: "
            "safetensors.torch.save_file(torch.load(path, weights_only=False).state_dict(), 'x.safetensors')"
        ) from error
    if not isinstance(found, Mapping):
        raise WeightsError(f"vit: weights {str(path)!r} hold a {type(found).__name__}, not a state dict")
    return found


def _is_whole_pickle(path: Path) -> bool:
    """Whether the file is a plain pickle from its first to its last opcode; looks, executes nothing."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in pickletools.genops(file)) > 1 and not file.read(1)
    except (ValueError, EOFError, IndexError, struct.error):
        return False


def _read_folder(folder: Path) -> Checkpoint:
    """A run folder of `vit train` (model.json, best.safetensors) or a folder with model.safetensors and
    config.json."""
    if (folder / "model.json").exists():
        record = _read_json(folder / "model.json")
        for key, kind in (("name", str), ("arch", dict), ("preprocess", dict), ("class_names", list)):
            if not isinstance(record.get(key), (kind, type(None))):
                raise WeightsError(
                    f"vit: {str(folder / 'model.json')!r} is damaged: {key} is {record[key]!r}, not a {kind.__name__}"
                )
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
            return _checkpoint(
                read_file(folder / file), str(folder / file), **(transformers.about(config) or _timm_config(config))
            )
    raise FileNotFoundError(
        f"vit: folder {str(folder)!r} holds neither a run (model.json) nor model.safetensors; "
        "pass the weights file itself"
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
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"vit: {str(path)!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"vit: {str(path)!r} holds a {type(found).__name__}, not an object of names and values")
    return found


def _timm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config.json beside timm's published weights says of their model; nothing for other ones."""
    pretrained = config.get("pretrained_cfg") or {}
    keys = ("mean", "std", "interpolation", "crop_pct")
    return {
        "name": config.get("architecture"),
        "arch": config.get("model_args") or {},
        "preprocess": {key: pretrained[key] for key in keys if key in pretrained} or None,
        "class_names": tuple(config.get("label_names") or ()) or None,
    }


def _checkpoint(found: Mapping[str, Any], source: str, **about: Any) -> Checkpoint:
    """Unwraps what training programs wrap, recognises the layout, converts the names."""
    for wrapper in WRAPPERS:
        if isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
            break
    state = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if not state:
        keys = some([str(key) for key in found]) or "none"
        raise WeightsError(f"vit: {source} holds no tensors that are parameters; its entries: {keys}")
    for layout in (jax, transformers, torchvision):
        if layout.recognises(state):
            state = _convert(layout.convert, state, source)
    return Checkpoint(state, source, **about)


def _convert(
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], state: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    try:
        return convert(state)
    except KeyError as error:
        raise WeightsError(f"vit: {source} lacks {error.args[0]}, which its other names call for") from error
    except RuntimeError as error:
        raise WeightsError(f"vit: {source} holds a tensor of another shape than its name says: {error}") from error


def _similar_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {str(path.parent)!r}"
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=3)
    return f"; nearest in its folder: {', '.join(near)}" if near else ""
