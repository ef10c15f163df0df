"""The index of a folder of images: what each file was found to be, so that no training decodes all of them again.

It is a NumPy archive, whose parts carry checksums, beside the images (`.vit-index.npz`) or, where that cannot be
written, in the user's cache. A file whose size or time of change is another one than in the index is checked anew.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..support.files import replacing
from ..support.images import ImageError, explain, opened, upright_size
from .samples import DataError

NAME = ".vit-index.npz"
FORMAT = 2

_COLUMNS = {
    **{"size": np.int64, "changed": np.int64, "crc": np.uint32},
    **{"width": np.int32, "height": np.int32, "mark": np.uint64},
}

#: What looks at an item; it gives the picture's mark (vit.data.equal), or nothing where it does not decode.
Check = Callable[[Any], int | None]


@dataclass(frozen=True)
class Entry:
    """A file: bytes, time of change in ns, CRC-32 of its content, the upright picture's sides, its mark, and why it is
    unusable ("" for one that is)."""

    size: int
    changed: int
    crc: int
    width: int
    height: int
    mark: int
    reason: str

    def is_of(self, about: os.stat_result) -> bool:
        """Whether the file is the one that was looked at, by its size and time of change."""
        return self.size == about.st_size and self.changed == about.st_mtime_ns


class Index:
    """Entries by the file's path below `root`."""

    def __init__(self, root: Path, entries: dict[str, Entry], path: Path | None = None) -> None:
        self.root, self.entries, self.path = root, entries, path

    @classmethod
    def of(cls, root: Path) -> Index | None:
        """The index of a folder; None where there is none, or one that is damaged: then all files are checked."""
        for path in places(root):
            try:
                if path.is_file():
                    return cls(root, _read(path), path)
            except DataError:
                continue
        return None

    def find(self, path: Path) -> Entry | None:
        """The entry of a file that has not changed since."""
        entry = self.entries.get(self.key(path))
        return entry if entry and entry.is_of(os.stat(path)) else None

    def key(self, path: Path) -> str:
        """The file's name in the index."""
        return os.path.relpath(path, self.root)

    def guarding(self, check: Check) -> Check:
        """`check`, which is not asked about files that the index knows."""

        def known(item: Any) -> int | None:
            entry = self.find(item) if isinstance(item, Path) else None
            if entry is None:
                return check(item)
            if entry.reason:
                raise ImageError(entry.reason)
            return entry.mark

        return known

    def digest(self) -> str:
        """A checksum of the names and contents of all files."""
        found = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            found.update(os.fsencode(name) + b"\0" + entry.crc.to_bytes(4, "little") + entry.size.to_bytes(8, "little"))
        return found.hexdigest()

    def write(self) -> Path:
        """Replaces the index on the disk, beside the images or in the cache; where it is. OSError where neither can be
        written."""
        names = sorted(self.entries)
        entries = [self.entries[name] for name in names]
        columns = {key: np.array([getattr(entry, key) for entry in entries], kind) for key, kind in _COLUMNS.items()}
        texts = {
            "names": b"\0".join(map(os.fsencode, names)),
            "reasons": b"\0".join(entry.reason.encode("utf-8", "replace") for entry in entries),
        }
        parts: dict[str, Any] = columns | {key: np.frombuffer(text, np.uint8) for key, text in texts.items()}
        parts["about"] = np.array([FORMAT, len(names)], np.int64)
        beside, cached = places(self.root)
        self.path = beside if os.access(self.root, os.W_OK) else cached
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **parts)
        return self.path


def places(root: Path) -> tuple[Path, Path]:
    """Where the index of a folder may be: in it, or in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    return root / NAME, cache / "vit" / "index" / f"{name}.npz"


def _read(path: Path) -> dict[str, Entry]:
    """The entries of an index file; DataError where it is damaged or of another version."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            parts = {name: archive[name] for name in archive.files}  # zipfile compares the checksums
        version, count = parts["about"].tolist()
        if version != FORMAT:
            raise DataError(f"vit: {path} is an index of another version of vit; make it anew with vit data index")
        names, reasons = (bytes(parts[key]).split(b"\0") if count else [] for key in ("names", "reasons"))
        columns = [parts[key].tolist() for key in _COLUMNS]
        if any(len(column) != count for column in (names, reasons, *columns)):
            raise ValueError("its parts have different lengths")
        return {
            os.fsdecode(name): Entry(size, changed, crc, width, height, mark, reason.decode())
            for name, reason, size, changed, crc, width, height, mark in zip(names, reasons, *columns, strict=True)
        }
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"vit: the index {path} is damaged ({error}); make it anew with vit data index") from error


class Recorder:
    """Checks files and writes down what they are. With `old`, files that have not changed since are taken from it; with
    `verify` their content is compared, too, and `changed` has the names of those whose is another one."""

    def __init__(self, root: Path, old: Index | None = None, verify: bool = False) -> None:
        self.index = Index(root, {})
        self.old, self.verify = old, verify
        self.checked = self.cached = 0
        self.changed: list[str] = []

    def watching(self, check: Check) -> Check:
        """`check` of files, whose outcomes are written down; of other items `check` itself."""
        return lambda item: self._look(item, check) if isinstance(item, Path) else check(item)

    def _look(self, path: Path, check: Check) -> int:
        about = os.stat(path)
        entry = self.old.find(path) if self.old else None
        if entry and self.verify and _crc(path) != entry.crc:
            self.changed.append(self.index.key(path))
            entry = None
        if entry:
            self.cached += 1
        else:
            self.checked += 1
            entry = _entry(path, about, check)
        self.index.entries[self.index.key(path)] = entry
        if entry.reason:
            raise ImageError(entry.reason)
        return entry.mark


def _entry(path: Path, about: os.stat_result, check: Check) -> Entry:
    width = height = crc = mark = 0
    reason = ""
    try:
        crc = _crc(path)
        mark = check(path) or 0
        with opened(path) as image:
            width, height = upright_size(image)
    except Exception as error:  # as in vit.data.samples.read_image
        reason = explain(path, error).replace("\0", " ")
    return Entry(about.st_size, about.st_mtime_ns, crc, width, height, mark, reason)


def _crc(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found
