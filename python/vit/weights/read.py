"""Reading weights without ever executing them: safetensors, NumPy archives, tensors-only pickles, folders,
the hub."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..support.text import printable
from .checkpoint import Checkpoint, WeightsError, all_finite, some
from .file import checkpoint_of, read_file, shown
from .folder import HUB, is_of_run, read_file_of_run, read_folder, read_hub

log = logging.getLogger("vit")


def load(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file, folder or hub repository, under timm's parameter names. Raises as `read`."""
    return dict(read(source).state)


def read(
    source: str | os.PathLike[str] | Mapping[str, Tensor] | Checkpoint,
    non_finite: str = "error",
    allow: Sequence[str] = (),
) -> Checkpoint:
    """Everything a source of weights says; a mapping is taken as a state dict.

    non_finite: whether NaN and infinities are an "error" or make a "warn"-ing that names their parameters.
    allow: names of parameters, also with wildcards (`*`), that a load may leave out of the file or, of the model, at
    their first values.
    Raises FileNotFoundError when there is no such file, WeightsError when it cannot be read safely.
    """
    if isinstance(allow, str):
        raise TypeError("vit: allow must be a list of names, not one text")
    if isinstance(source, Checkpoint):
        return replace(source, allow=(*source.allow, *allow)) if allow else source
    checkpoint = replace(_read(source), allow=tuple(allow))
    if checkpoint.dropped:
        reasons: dict[str, list[str]] = {}
        for key, why in checkpoint.dropped.items():
            reasons.setdefault(why, []).append(printable(key))
        text = "; ".join(f"{some(keys, 4)} ({why})" for why, keys in reasons.items())
        log.warning("%s: left out: %s", checkpoint.source, text)
    check_finite(checkpoint, non_finite)
    return checkpoint


def _read(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Checkpoint:
    if isinstance(source, Mapping):
        return checkpoint_of(source, "the given state dict")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"vit: weights must be a path, 'hf-hub:organisation/name' or a state dict, got {type(source).__name__}"
            + ("; pass its .state_dict()" if hasattr(source, "state_dict") else "")
        )
    if isinstance(source, str) and source.startswith(HUB):
        return read_hub(source.removeprefix(HUB))
    path = Path(os.fsdecode(source))
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"vit: weights {str(path)!r}: {error}") from error
    if len(path.name) > 255 or len(str(path)) > 4095:  # Linux refuses even to look
        raise FileNotFoundError(f"vit: weights {str(path)[:60]!r}... do not exist: the name is too long")
    if path.is_dir():
        return read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"vit: weights {str(path)!r} do not exist{_similar_files(path)}")
    return read_file_of_run(path) if is_of_run(path) else checkpoint_of(read_file(path), shown(path))


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


def _similar_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {str(path.parent)!r}"
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=3)
    return f"; nearest in its folder: {printable(', '.join(near))}" if near else ""
