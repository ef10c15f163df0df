"""Files that are either the old version or the new one, never a part of it, whatever happens while
writing; and JSON that every parser reads."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

log = logging.getLogger("vit")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to; on success its content is on the disk and takes the place of
    `path`.

    After any error, a full disk included, `path` is what it was and the temporary file is gone. A kill leaves
    the temporary file behind, under one fixed name that the next write reuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode  # what the user's umask gives; safetensors makes private files
        yield temporary
        with open(temporary, "rb+") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces the content of a text file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """The value as JSON. NaN and infinities, which JSON does not have, become null, and a warning names them."""
    lost: list[str] = []
    text = json.dumps(_finite(value, "", lost), indent=indent, default=default, allow_nan=False)
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        log.warning("null in the JSON, being no finite number: %s%s", ", ".join(lost[:5]), more)
    return text


def _finite(value: Any, name: str, lost: list[str]) -> Any:
    """The value with None for each float that is not finite; `lost` gets its name and what it was."""
    if isinstance(value, dict):
        return {key: _finite(item, f"{name}.{key}" if name else str(key), lost) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, f"{name}[{i}]", lost) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(f"{name or 'the value'} ({value})")
        return None
    return value


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replaces a safetensors file; OSError when it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (SafetensorError, OSError) as error:
        # safetensors has an exception of its own for a full disk; for a caller it is one of the system's.
        raise OSError(f"vit: cannot write {path}: {error}. The file before this one is unchanged") from error


def append_line(path: Path, line: str, offset: int) -> int:
    """Cuts the file at `offset`, writes the line there and returns the offset behind it, all of it on the
    disk."""
    with open(path, "ab") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _sync_folder(folder: Path) -> None:
    """Makes a rename in the folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
