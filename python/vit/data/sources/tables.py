"""Image data sets of Hugging Face `datasets` on the disk: Parquet files, or Arrow files as save_to_disk writes them.

An image column holds {"bytes", "path"} or plain bytes, a label column numbers, whose names the schema's metadata says,
or texts. Files say their split by name (train-00000-of-00004.parquet) or by folder (train/data-00000-of-00001.arrow).
The encoded pictures of Parquet are held in memory, those of Arrow stay on the disk.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...support.extras import require
from ...support.images import open_image
from ...support.records import Record, RecordError, parse_json
from ..folder import check_of, describe, examined
from ..format import Format, Request, path_of
from ..labels import by_names, by_values
from ..layout import split_word
from ..samples import DataError, Samples, Skipped, Source
from ..stored import Stored

_SUFFIXES = (".parquet", ".arrow")
_IMAGE, _LABEL = ("image", "img", "picture", "jpg", "png"), ("label", "labels", "fine_label", "class", "target", "cls")


class Column:
    """The encoded pictures of a table's column."""

    def __init__(self, path: Path, column: Any, where: str) -> None:
        self.path, self.column, self._where = path, column, where

    def content(self, index: int) -> bytes:
        """The bytes of a picture's file."""
        value = self.column[index].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise DataError("the picture is not in the table, only its path" if value is None else "no picture")
        return value

    def picture(self, index: int) -> Image.Image:
        return open_image(io.BytesIO(self.content(index)))

    def name(self, index: int) -> str:
        return f"row {index} of {self._where}"

    def digest(self) -> bytes:
        return hashlib.sha256(f"{self.path.name} {self.path.stat().st_size} {len(self.column)}".encode()).digest()


def tables(data: str, request: Request) -> Source:
    """The data set of one Parquet or Arrow file, or of those in and below a folder."""
    root = path_of(data)
    parts: dict[str, list[Samples]] = {}
    skipped: list[Skipped] = []
    names: list[str] | None = None
    for path in _files(root):
        samples, found = _read(path, request, skipped)
        if names is not None and found is not None and names != found:
            raise DataError(f"vit: {path} has other class names than the files before it")
        names = names or found
        split = split_word(path.name) or (split_word(path.parent.name) if path.parent != root.parent else None)
        if len(samples):
            parts.setdefault(split or "train", []).append(samples)
    if skipped and request.bad_images == "refuse":
        raise DataError(f"vit: {describe(skipped, root)}. Remove them, or use --bad-images skip")
    splits = {split: Samples.concatenate(found) for split, found in parts.items()}
    if not splits:
        raise DataError(f"vit: {root} has no usable image" + (f"; {describe(skipped, root)}" if skipped else ""))
    if names:
        source = by_names(root.stem, "tables", splits, names, root, request)
    else:
        source = by_values(root.stem, "tables", splits, root, request)
    return Source(source.name, source.kind, source.class_names, source.splits, tuple(skipped))


def _read(path: Path, request: Request, skipped: list[Skipped]) -> tuple[Samples, list[str] | None]:
    """The usable images of a file, and the class names that its schema tells."""
    table = _table(path)
    image, label = (_column(path, table, names) for names in (_IMAGE, _LABEL))
    labels = table.column(label).to_pylist()
    kinds = {type(value) for value in labels}
    if not kinds <= {int} and not kinds <= {str}:
        wrong = next(i for i, value in enumerate(labels) if type(value) is not (int if int in kinds else str))
        raise DataError(f"vit: {path}, row {wrong}: {label} is {labels[wrong]!r:.40}; a label is a number or a text")
    column = Column(path, table.column(image), str(path))
    check = check_of(request.validate)
    reasons, marks = examined(
        range(len(labels)), lambda i: check(io.BytesIO(column.content(i))), len(labels), request.report
    )
    skipped += [Skipped(path / str(i), why) for i, why in enumerate(reasons) if why]
    usable = np.flatnonzero([not why for why in reasons])
    array = np.array(labels, dtype=np.int64 if int in kinds or not kinds else None)
    keys = [f"{path.name}/{i}" for i in range(len(labels))]
    samples = Samples(Stored.of(column, len(labels)), array, keys, marks=marks).take(usable)
    return samples, _class_names(path, table, label)


def _table(path: Path) -> Any:
    pyarrow = require("pyarrow", "data")
    try:
        if path.suffix == ".parquet":
            return require("pyarrow.parquet", "data").read_table(path, partitioning=None)
        with pyarrow.memory_map(str(path)) as source:
            try:
                return pyarrow.ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:
                return pyarrow.ipc.open_file(source).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"vit: {path} cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}") from error


def _column(path: Path, table: Any, names: tuple[str, ...]) -> str:
    found = [name for name in names if name in table.column_names]
    if not found:
        there = ", ".join(table.column_names[:10])
        raise DataError(f"vit: {path} has the columns {there}; none of them is called {', '.join(names)}")
    return found[0]


def _class_names(path: Path, table: Any, label: str) -> list[str] | None:
    """Those of the ClassLabel that `datasets` writes into the schema's metadata."""
    about = (table.schema.metadata or {}).get(b"huggingface")
    if about is None:
        return None
    try:
        features = Record(parse_json(about, f"{path}: metadata"), f"{path}: metadata").record("info").record("features")
        kind = features.record(label)
        return list(kind.texts("names")) if "names" in kind else None
    except RecordError:
        return None


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    files = sorted(path for suffix in _SUFFIXES for path in root.rglob(f"*{suffix}"))
    return [path for path in files if not path.name.startswith(("cache-", "."))]


def _recognizes(data: str) -> bool:
    root = path_of(data)
    if root.is_file():
        return root.suffix in _SUFFIXES
    levels = ("", "*/")  # a hub repository has data/, a saved dictionary a folder per split
    return root.is_dir() and any(True for level in levels for s in _SUFFIXES for _ in root.glob(f"{level}*{s}"))


def _recipe(data: str) -> str:
    source = tables(data, Request(classes=(), validate="header"))
    image = next(iter(source.splits.values())).image(0)
    if max(image.size) > 64:
        return "folder"
    return "mnist" if image.mode == "L" else "cifar"


FORMAT = Format(
    about="Parquet or Arrow files of Hugging Face datasets",
    recognizes=_recognizes,
    open=tables,
    recipe=_recipe,
    rank=35,
)
