"""Reading weights without ever executing them: safetensors, NumPy archives, tensors-only pickles, folders,
the hub."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ..support.text import printable
from . import jax, torchvision, transformers
from .archive import read_npz
from .checkpoint import Checkpoint, WeightsError, all_finite, some
from .pickles import read_pickle
from .tensors import plain
from .unwrap import unwrap

log = logging.getLogger("vit")

HUB = "hf-hub:"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar")
SUFFIXES = (".safetensors", ".npz", *PICKLES)


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
    if checkpoint.dropped:
        reasons: dict[str, list[str]] = {}
        for key, why in checkpoint.dropped.items():
            reasons.setdefault(why, []).append(printable(key))
        text = "; ".join(f"{some(keys, 4)} ({why})" for why, keys in reasons.items())
        log.warning("%s: left out: %s", checkpoint.source, text)
    check_finite(checkpoint, non_finite)
    return checkpoint


def _read(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Checkpoint:
    from . import folder

    if isinstance(source, Mapping):
        return checkpoint_of(source, "the given state dict")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"vit: weights must be a path, 'hf-hub:organisation/name' or a state dict, got {type(source).__name__}"
            + ("; pass its .state_dict()" if hasattr(source, "state_dict") else "")
        )
    if isinstance(source, str) and source.startswith(HUB):
        return folder.read_hub(source.removeprefix(HUB))
    path = Path(os.fsdecode(source))
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"vit: weights {str(path)!r}: {error}") from error
    if len(path.name) > 255 or len(str(path)) > 4095:  # Linux refuses even to look
        raise FileNotFoundError(f"vit: weights {str(path)[:60]!r}... do not exist: the name is too long")
    if path.is_dir():
        return folder.read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"vit: weights {str(path)!r} do not exist{_similar_files(path)}")
    return checkpoint_of(read_file(path), shown(path))


def shown(path: Path) -> str:
    """A path as error texts and logs may show it."""
    return printable(str(path))


def check_finite(checkpoint: Checkpoint, non_finite: str) -> None:
    """Names the parameters that hold NaN or infinities, as WeightsError or as a log warning."""
    if non_finite not in ("error", "warn"):
        raise ValueError(f"vit: non_finite={non_finite!r} is not one of 'error', 'warn'")
    bad = [key for key, value in checkpoint.state.items() if not all_finite(value)]
    if not bad:
        return
    text = f"{checkpoint.source}: NaN or infinite values in {printable(some(bad))}"
    if non_finite == "error":
        raise WeightsError(
            f"vit: {text}. Take a checkpoint from before the training diverged; to load this one all the same, "
            "pass weights=vit.weights.read(source, non_finite='warn')"
        )
    log.warning(text)


def read_file(path: Path) -> Mapping[str, Any]:
    """The tensors of one file by name; WeightsError when it is truncated, unknown or would execute code."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise WeightsError(f"vit: weights {str(path)!r}: the suffix is not one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise WeightsError(f"vit: weights {str(path)!r} are no regular file")
    readers: dict[str, Callable[[Path], Mapping[str, Any]]] = {".safetensors": _read_safetensors, ".npz": read_npz}
    try:
        return readers.get(suffix, read_pickle)(path)
    except (WeightsError, PermissionError):
        raise
    except Exception as error:  # a broken file makes each reader stumble in half a dozen ways
        why = printable(next(iter(str(error).splitlines()), type(error).__name__))
        raise WeightsError(
            f"vit: weights {str(path)!r} ({path.stat().st_size} bytes) are truncated or not a {suffix} file: {why}"
        ) from error


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        str(path).encode()
    except UnicodeEncodeError:  # a name that safetensors does not take
        return safetensors.torch.load(path.read_bytes())
    return safetensors.torch.load_file(path)


def checkpoint_of(found: Mapping[str, Any], source: str, **about: Any) -> Checkpoint:
    """Unwraps what training programs wrap, recognises the layout, converts the names, checks every tensor."""
    state, dropped = unwrap(found, source)
    layout: Any = next((layout for layout in (jax, transformers, torchvision) if layout.recognises(state)), None)
    if layout is not None:
        state, beside = layout.select(state)
        dropped |= beside
    tensors = {key: plain(key, value, source) for key, value in state.items()}
    implied: dict[str, Any] = {}
    if layout is not None:
        tensors, implied, beside = _convert(layout.convert, tensors, source)
        dropped |= beside
    return Checkpoint(tensors, source, implied=implied, dropped=dropped, **about)


def _convert(convert: Callable[[Mapping[str, Tensor]], Any], state: Mapping[str, Tensor], source: str) -> Any:
    try:
        return convert(state)
    except KeyError as error:
        name = printable(str(error.args[0]))
        raise WeightsError(f"vit: {source} lacks {name}, which its other names call for") from error
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        why = printable(next(iter(str(error).splitlines()), type(error).__name__))
        raise WeightsError(f"vit: {source} holds a tensor of another shape than its name says: {why}") from error


def _similar_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {str(path.parent)!r}"
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=3)
    return f"; nearest in its folder: {printable(', '.join(near))}" if near else ""
