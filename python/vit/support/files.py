"""Files that are either the old version or the new one, never a part of it, whatever happens while
writing; and JSON that every parser reads."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import stop
from .records import read_regular

log = logging.getLogger("vit")


class Refused(OSError):
    """A file that vit does not write to; the text is a sentence, without the system's number before it."""

    def __str__(self) -> str:
        return self.strerror or ""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to; on success its content is on the disk and takes the place of
    `path`.

    The temporary file is created for this write alone, under a name nobody can prepare a link at. After any error, a
    full disk included, `path` is what it was and the temporary file is gone; a kill leaves it behind (see
    `remove_leftovers`). Raises OSError, with `path` as its file, where it cannot be written, and where it is a link, or
    a device or pipe, which a rename would remove.
    """
    refuse_link(path)
    if path.exists() and not path.is_file():
        raise Refused(errno.EINVAL, f"vit: {path} is no regular file, and a file is not put in its place; name another")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")

    def tidy() -> None:
        temporary.unlink(missing_ok=True)

    try:
        with stop.when_stopped(tidy):
            try:
                yield from _written(path, temporary)
            except BaseException:
                tidy()
                raise
    except OSError as error:
        if (named := _about(error, path, temporary)) is error:
            raise
        raise named from error


def _written(path: Path, temporary: Path) -> Iterator[Path]:
    """The steps of `replacing`."""
    flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode  # what the user's umask gives; safetensors makes private files
    finally:
        os.close(descriptor)
    yield temporary
    descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, stat.S_IMODE(mode))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _about(error: OSError, path: Path, temporary: Path) -> OSError:
    """The error with the file that could not be written: a full disk has no name, a library's text no number."""
    if isinstance(error, BrokenPipeError) or error.filename not in (None, str(temporary), temporary):
        return error  # of another file
    if error.strerror is None:
        return OSError(errno.EIO, f"cannot be written ({error})", str(path))
    return error if error.strerror.startswith("vit: ") else type(error)(error.errno, error.strerror, str(path))


def said(error: BaseException) -> str:
    """What an error says; of the system's errors the file and the reason, without their number."""
    if isinstance(error, OSError) and error.strerror:
        named = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{named}{error.strerror}"
    return str(error)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that killed writes left in a folder. Only for the folder's one owner."""
    for path in filter(is_leftover, folder.iterdir()):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a file is called as the temporary ones of `replacing`."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def refuse_link(path: Path) -> None:
    """OSError where `path` is a symbolic link: what it points to may belong to somebody else."""
    if path.is_symlink():
        raise Refused(
            errno.ELOOP,
            f"vit: {path} is a link to {os.readlink(path)!r}, and vit writes to no link; remove it or name the file "
            "itself",
        )


def write_text(path: Path, text: str) -> None:
    """Replaces the content of a text file."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the content of a file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


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


def append_line(path: Path, line: str, offset: int) -> int:
    """Replaces the file by its first `offset` bytes and the line; returns the offset behind it, all of it on the disk.

    The file is written anew, not in place: another name of it (a hard link of a backup) keeps the old content.
    """
    refuse_link(path)
    kept = read_regular(path)[:offset] if offset else b""
    content = kept + line.encode() + b"\n"
    write_bytes(path, content)
    return len(content)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in the folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
