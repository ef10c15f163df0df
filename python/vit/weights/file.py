"""One file of weights: its format, the layout of its names, its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ..support.accidents import LOOKED_AT, instead
from ..support.tensors import read_tensors
from ..support.text import printable
from .archive import read_npz
from .checkpoint import Checkpoint, WeightsError
from .layout import Converted, Layout
from .pickles import read_pickle
from .tensors import plain
from .unwrap import unwrap

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar")
SUFFIXES = (".safetensors", ".npz", *PICKLES)


def shown(path: Path) -> str:
    """A path as error texts and logs may show it."""
    return printable(str(path))


def read_file(path: Path) -> Mapping[str, Any]:
    """The tensors of one file by name; WeightsError when it is truncated, unknown or would execute code."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        folder = "; the parts that an index lists are read from its folder: pass that"
        hint = folder if path.name.endswith(".index.json") else ""
        raise WeightsError(f"vit: weights {str(path)!r}: the suffix is not one of {', '.join(SUFFIXES)}{hint}")
    if not path.is_file():
        raise WeightsError(f"vit: weights {str(path)!r} are no regular file")
    readers: dict[str, Callable[[Path], Mapping[str, Any]]] = {".safetensors": _read_safetensors, ".npz": read_npz}
    try:
        return readers.get(_kind(path, suffix), read_pickle)(path)
    except (WeightsError, PermissionError):
        raise
    except Exception as error:  # a broken file makes each reader stumble in half a dozen ways
        why = _instead(path) or printable(next(iter(str(error).splitlines()), type(error).__name__))
        if "weights_only" in why:  # PyTorch's advice to trust the file
            why = "no archive and no pickle that torch.save wrote"
        raise WeightsError(
            f"vit: weights {str(path)!r} ({path.stat().st_size} bytes) are truncated or not a {suffix} file: {why}"
        ) from error


def _instead(path: Path) -> str | None:
    with path.open("rb") as file:
        return instead(file.read(LOOKED_AT))


def _kind(path: Path, suffix: str) -> str:
    """The suffix that fits the content: files of one kind are often downloaded under the name of another."""
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"vit: weights {str(path)!r} are a pointer of Git LFS, not the file itself; fetch it with: git lfs pull"
        )
    # The length of safetensors' header comes first, and may begin with a pickle's 0x80.
    tensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    if suffix == ".safetensors" and not tensors and start.startswith((b"PK\x03\x04", b"\x80")):
        return ".pt"
    return ".safetensors" if suffix in PICKLES and tensors else suffix


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        str(path).encode()
    except UnicodeEncodeError:  # a name that safetensors does not take
        return safetensors.torch.load(path.read_bytes())
    return read_tensors(path)[1]  # of our own files the checksums are compared


def checkpoint_of(found: Mapping[str, Any], source: str, **about: Any) -> Checkpoint:
    """Unwraps what training programs wrap, recognises the layout, converts the names, checks every tensor."""
    state, dropped, layout = unwrap(found, source)
    tensors = {key: plain(key, value, source) for key, value in state.items()}
    if layout is None:
        return Checkpoint(tensors, source, dropped=dropped, **about)
    result = _convert(layout, tensors, source)
    dropped |= result.dropped
    about["base"] = result.base or about.get("base") or layout.base
    return Checkpoint(
        result.state,
        source,
        implied=result.implied,
        dropped=dropped,
        layout=layout.name,
        mapped=tuple(result.mapped),
        **about,
    )


def _convert(layout: Layout, state: Mapping[str, Tensor], source: str) -> Converted:
    try:
        return layout.convert(state)
    except KeyError as error:
        name = printable(str(error.args[0]))
        raise WeightsError(f"vit: {source} lacks {name}, which its other names call for") from error
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        why = printable(next(iter(str(error).splitlines()), type(error).__name__))
        raise WeightsError(f"vit: {source} holds a tensor of another shape than its name says: {why}") from error
