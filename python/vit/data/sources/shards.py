"""WebDataset shards: tar files whose members belong together by name (000017.jpg, 000017.cls).

The label is a number in .cls (or .json with "label", or a text in .txt as the last resort). A shard's name says its
split (train-000000.tar, val-...); classes.txt or labels.txt beside the shards names the classes. Members are found once
by their headers and then read where they lie, so that any order costs the same and a training can go on anywhere.
"""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...support.images import EXTENSIONS, open_image
from ...support.records import Record, parse_json
from ...support.text import printable
from ..folder import check_of, describe, examined
from ..format import Format, Request, names_in, path_of
from ..labels import by_names, by_values
from ..layout import split_word
from ..samples import DataError, Samples, Skipped, Source
from ..stored import Stored

MAX_TEXT = 1 << 20  # bytes of a member that is a label
_NAMES = ("classes.txt", "labels.txt", "class_names.txt")


@dataclass(eq=False)
class Shard:
    """Places of pictures in a tar file."""

    path: Path
    names: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)  # offset and length

    def content(self, index: int) -> bytes:
        """The bytes of a picture's file."""
        offset, length = self.places[index]
        with open(self.path, "rb") as file:
            content = os.pread(file.fileno(), length, offset)
        if len(content) < length:
            raise DataError(f"vit: {self.path} is cut off inside {printable(self.names[index])}")
        return content

    def picture(self, index: int) -> Image.Image:
        return open_image(io.BytesIO(self.content(index)))

    def name(self, index: int) -> str:
        return f"{self.names[index]} in {self.path}"

    def digest(self) -> bytes:
        return repr((self.path.name, self.path.stat().st_size, self.places)).encode()


def shards(data: str, request: Request) -> Source:
    """The data set of one tar file, or of all in a folder."""
    root = path_of(data)
    paths = [root] if root.is_file() else [path for path in sorted(root.iterdir()) if _is_shard(path.name)]
    folder = root.parent if root.is_file() else root
    parts: dict[str, list[Samples]] = {}
    skipped: list[Skipped] = []
    for path in paths:
        samples = _read(path, request, skipped)
        if len(samples):
            parts.setdefault(split_word(path.name.partition(".")[0]) or "train", []).append(samples)
    if skipped and request.bad_images == "refuse":
        raise DataError(f"vit: {describe(skipped, folder)}. Remove them, or use --bad-images skip")
    splits = {split: Samples.concatenate(found) for split, found in parts.items()}
    if not splits:
        raise DataError(f"vit: {root} has no usable image" + (f"; {describe(skipped, folder)}" if skipped else ""))
    names = next((path for name in _NAMES if (path := folder / name).is_file()), None)
    if names and all(samples.labels.dtype.kind == "i" for samples in splits.values()):
        lines = names.read_text(encoding="utf-8").splitlines()
        source = by_names(root.stem, "shards", splits, lines, root, request)
    else:
        if len({samples.labels.dtype.kind for samples in splits.values()}) > 1:
            raise DataError(f"vit: {root}: the labels of some shards are numbers, of others texts")
        source = by_values(root.stem, "shards", splits, root, request)
    return Source(source.name, source.kind, source.class_names, source.splits, tuple(skipped))


def _read(path: Path, request: Request, skipped: list[Skipped]) -> Samples:
    """The usable images of a shard, with numbers or texts as labels."""
    shard, labels = _index(path, skipped)
    check = check_of(request.validate)
    count = len(shard.names)
    reasons, marks = examined(range(count), lambda i: check(io.BytesIO(shard.content(i))), count, request.report)
    skipped += [Skipped(path / shard.names[i], why) for i, why in enumerate(reasons) if why]
    usable = np.flatnonzero([not why for why in reasons])
    keys = [f"{path.name}/{name}" for name in shard.names]
    if len({type(label) for label in labels}) > 1:
        raise DataError(f"vit: {path}: some labels are numbers, others texts")
    array = np.array(labels, dtype=np.int64 if labels and isinstance(labels[0], int) else None)
    return Samples(Stored.of(shard, count), array, keys, marks=marks).take(usable)


def _index(path: Path, skipped: list[Skipped]) -> tuple[Shard, list[int | str]]:
    """The pictures of a shard that have a label."""
    pictures: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, dict[str, int | str]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}"
                if f".{suffix.lower()}".endswith(tuple(EXTENSIONS)):
                    if key in pictures:
                        raise DataError(f"vit: {path} has two pictures called {printable(key.lstrip('/'))}")
                    pictures[key] = (member.name, member.offset_data, member.size)
                elif suffix.lower() in ("cls", "json", "txt"):
                    labels.setdefault(key, {})[suffix.lower()] = _label(path, archive, member, suffix.lower())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"vit: {path} is no tar file that can be read, or cut off: {error}") from error
    shard, found = Shard(path), []
    for key, (name, offset, size) in pictures.items():
        answers = labels.get(key, {})
        if label := next(([answers[kind]] for kind in ("cls", "json", "txt") if answers.get(kind, "") != ""), None):
            shard.names.append(name)
            shard.places.append((offset, size))
            found += label
        else:
            skipped.append(Skipped(path / name, "no .cls, .json or .txt with a label beside it"))
    return shard, found


def _label(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> int | str:
    where = f"{path}: {printable(member.name)}"
    if member.size > MAX_TEXT:
        raise DataError(f"vit: {where} has {member.size:,} bytes; a label has few")
    file: Any = archive.extractfile(member)
    content = file.read()
    if suffix == "json":
        values = Record(parse_json(content, where), where)
        key = next((key for key in ("label", "cls", "class") if key in values), None)
        label = values.raw(key) if key else ""
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise DataError(f"vit: {where}: {key} is {label!r:.60}; a label is a whole number or a text")
        return label
    text = str(content, "utf-8", "replace").strip()
    if suffix == "cls" and not text.lstrip("-").isdecimal():
        raise DataError(f"vit: {where} is {text[:40]!r}; it must be a whole number")
    return int(text) if suffix == "cls" else text


def _is_shard(name: str) -> bool:
    return name.lower().endswith(".tar") and not name.startswith(".")


def _recognizes(data: str) -> bool:
    path = path_of(data)
    return (path.is_file() and _is_shard(path.name)) or any(map(_is_shard, names_in(data)))


FORMAT = Format(
    about="a .tar or a folder of .tar shards (WebDataset)",
    recognizes=_recognizes,
    open=shards,
    recipe=lambda data: "folder",
    rank=30,
)
