"""CSV files: Kaggle's Digit Recognizer (label, pixel0 ... pixel783), or image files with their labels (image, label).

A folder is read as one where it holds train.csv; test.csv beside it is the test split if it has labels. Both may be
packed with gzip. The pixels of a row are a square grey image.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...support.images import EXTENSIONS
from ...support.records import shown
from ...support.text import printable
from ..folder import check_of, describe, examined
from ..format import Format, Request, path_of
from ..labels import by_values
from ..layout import class_folders, split_folders
from ..samples import DataError, Samples, Skipped, Source

LINES = 1000  # parsed at a time
MAX_COLUMNS = 1 << 20
IMAGE = ("image", "path", "file", "filename", "file_name", "image_path", "filepath", "image_name", "image_id", "id")
LABEL = ("label", "class", "target", "category", "labels")


@dataclass(frozen=True)
class Pixels:
    """Images uint8 [n, side, side] and, where the file has them, labels int64 [n]."""

    images: np.ndarray
    labels: np.ndarray | None


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file of text, packed with gzip or not. DataError where it cannot be read."""
    try:
        with open(path, "rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            file: Any = gzip.GzipFile(fileobj=plain) if packed else plain
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"vit: cannot read {path}: it is no text in UTF-8 ({error}); save it so") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"vit: cannot read {path}: {error}") from error


def header_of(path: Path) -> list[str]:
    """The names of the columns."""
    line = next(lines_of(path), "")
    return [name.strip().strip('"') for name in line.split(",")]


def _pixel_columns(path: Path, header: list[str]) -> tuple[int | None, int]:
    """Where the label stands, if anywhere, and the side of the images. DataError where these are no pixels."""
    label = _label_column(header)
    count = len(header) - (label is not None)
    if not _is_pixels(header):
        raise _unknown_columns(path, header)
    if len(set(header)) < len(header):
        raise DataError(
            f"vit: {path}, line 1: column names repeat ({printable(','.join(header[:4])[:80])} ...), so this seems to "
            "be an image and the file to have no header; put the line label,pixel0,pixel1,... before it"
        )
    side = math.isqrt(count)
    if side * side != count or count > MAX_COLUMNS:
        raise DataError(f"vit: {path}, line 1: {count} pixel columns are no square image")
    return label, side


def _unknown_columns(path: Path, header: list[str]) -> DataError:
    return DataError(
        f"vit: {path}, line 1: the columns are {printable(','.join(header[:4])[:80])} ...; allowed are label,"
        "pixel0,pixel1,... (Kaggle's Digit Recognizer), pixel0,pixel1,..., or image,label"
    )


def _label_column(header: list[str]) -> int | None:
    """Where the one column of labels stands; OpenML's tables of pixels call it class."""
    found = [column for column, name in enumerate(header) if name.lower() in LABEL]
    return found[0] if len(found) == 1 else None


def _is_pixels(header: list[str]) -> bool:
    label = _label_column(header)
    rest = [name for column, name in enumerate(header) if column != label]
    return len(rest) > 0 and all(_is_pixel(name) for name in rest)


def _is_pixel(name: str) -> bool:
    """7, pixel7, or its row and column: 1x8."""
    row, by, column = name.partition("x")
    return name.removeprefix("pixel").isdigit() or (by == "x" and row.isdigit() and column.isdigit())


def is_pixel_table(path: Path) -> bool:
    """Whether it is a CSV file of pixels, with labels or without."""
    return path.is_file() and _is_pixels(header_of(path))


def read_pixels(path: Path) -> Pixels:
    """The images in a CSV file of pixels. DataError names the line and the value that cannot be."""
    header = header_of(path)
    label, side = _pixel_columns(path, header)
    parts: list[np.ndarray] = []
    block: list[str] = []
    first = 2
    lines = lines_of(path)
    next(lines)
    for number, line in enumerate(lines, 2):
        if not line.strip():
            _refuse_more(path, number, lines)
            break
        block.append(line)
        if len(block) == LINES:
            parts.append(_block(path, first, block, header, label))
            first, block = number + 1, []
    if block:
        parts.append(_block(path, first, block, header, label))
    if not parts:
        raise DataError(f"vit: {path} has no line with an image")
    table = np.concatenate(parts)
    pixels = table if label is None else np.delete(table, label, axis=1)
    labels = None if label is None else table[:, label].astype(np.int64)
    return Pixels(pixels.astype(np.uint8).reshape(-1, side, side), labels)


def _refuse_more(path: Path, number: int, lines: Iterator[str]) -> None:
    """DataError if anything stands below the empty line `number`."""
    if any(line.strip() for line in lines):
        raise DataError(f"vit: {path}, line {number} is empty, and others follow")


def _block(path: Path, first: int, lines: list[str], header: list[str], label: int | None) -> np.ndarray:
    """int32 [lines, columns]; the slow way, line by line, only to name what is wrong."""
    try:
        table = np.loadtxt(lines, delimiter=",", dtype=np.int32, ndmin=2, comments=None, quotechar='"')
        good = table.shape == (len(lines), len(header)) and table.min() >= 0
        if good and (table if label is None else np.delete(table, label, axis=1)).max() <= 255:
            return table
    except (ValueError, OverflowError):
        pass
    rows = [[cell.strip().strip('"') for cell in line.split(",")] for line in lines]
    for number, cells in enumerate(rows, first):
        _check_line(f"vit: {path}, line {number}", cells, header, label)
    return np.array([[int(float(cell)) for cell in cells] for cells in rows], np.int32)  # 12.0 is 12


def _check_line(where: str, cells: list[str], header: list[str], label: int | None) -> None:
    if len(cells) != len(header):
        raise DataError(f"{where} has {len(cells)} values, the header {len(header)} columns")
    for column, (name, cell) in enumerate(zip(header, cells, strict=True)):
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        most = 2**31 - 1 if column == label else 255
        if not (0 <= value <= most and value == int(value)):
            raise DataError(f"{where}: {name} is '{printable(cell[:40])}'; allowed are whole numbers from 0 to {most}")


# ---- the data sets ----


def table(data: str, request: Request) -> Source:
    """The data set of a CSV file, or of the folder with train.csv (and test.csv)."""
    paths = _files(data)
    if not _is_pixels(header_of(paths["train"])):
        return _listed(paths["train"], request)
    splits = {}
    for split, path in paths.items():
        found = read_pixels(path)
        if found.labels is None and split == "train":
            raise DataError(f"vit: {path} has no column label: there is nothing to learn or to compare with")
        if found.labels is not None:
            splits[split] = Samples(found.images, found.labels, [f"{split}-{i}" for i in range(len(found.labels))])
    sizes = {split: samples.images[0].shape for split, samples in splits.items()}  # type: ignore[union-attr]
    if len(set(sizes.values())) > 1:
        raise DataError(f"vit: the images of {paths['train']} are {sizes['train']}, of {paths['test']} {sizes['test']}")
    return by_values(paths["train"].name.partition(".")[0], "csv", splits, paths["train"], request)


def _listed(path: Path, request: Request) -> Source:
    """Image files, by paths from the CSV file's folder, and their labels: texts or numbers."""
    header = [name.lower() for name in header_of(path)]
    image = next((header.index(name) for name in IMAGE if name in header), None)
    label = next((header.index(name) for name in LABEL if name in header), None)
    if image is None or label is None:
        raise _unknown_columns(path, header)
    files, labels = [], []
    try:
        rows = csv.reader(lines_of(path), strict=True)
        next(rows)
        for cells in rows:
            if not cells:
                continue
            if len(cells) != len(header) or not cells[image] or not cells[label]:
                raise DataError(
                    f"vit: {path}, line {rows.line_num}: expected is {','.join(header)}, got {shown(cells)}"
                )
            files.append(image_file(path, rows.line_num, cells[image]))
            labels.append(cells[label])
    except csv.Error as error:
        raise DataError(f"vit: {path}, line {rows.line_num}: {error}") from error
    check = check_of(request.validate, path.parent, request.recorder)
    reasons, marks = examined(files, check, len(files), request.report)
    skipped = tuple(Skipped(file, why) for file, why in zip(files, reasons, strict=True) if why)
    if skipped and request.bad_images == "refuse":
        raise DataError(f"vit: {describe(skipped, path.parent)}. Remove them, or use --bad-images skip")
    usable = [i for i, why in enumerate(reasons) if not why]
    if not usable:
        raise DataError(f"vit: {path} names no usable image; {describe(skipped, path.parent)}")
    keys = [files[i].relative_to(path.parent).as_posix() for i in usable]
    samples = Samples([files[i] for i in usable], np.array([labels[i] for i in usable]), keys, marks=marks[usable])
    source = by_values(path.stem, "csv", {"train": samples}, path, request)
    return Source(source.name, source.kind, source.class_names, source.splits, skipped)


def image_file(path: Path, number: int, name: str) -> Path:
    """A path below the CSV file's folder: a table that came from elsewhere names no other files of this machine."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"vit: {path}, line {number}: {printable(name[:80])!r} is not below the folder of the CSV file")
    file = path.parent / name
    if not file.suffix and not file.is_file():
        file = next((found for end in sorted(EXTENSIONS) if (found := file.with_suffix(end)).is_file()), file)
    return file


def _files(data: str) -> dict[str, Path]:
    path = path_of(data)
    if not path.is_dir():
        return {"train": path}
    files = {split: [path / f"{split}.csv{end}" for end in ("", ".gz")] for split in ("train", "test")}
    return {split: found[0] for split, names in files.items() if (found := [file for file in names if file.is_file()])}


def _recognizes(data: str) -> bool:
    path = path_of(data)
    if path.is_dir():
        return "train" in _files(data) and not _has_classes(path)
    return path.is_file() and path.name.lower().endswith((".csv", ".csv.gz"))


def _has_classes(path: Path) -> bool:
    """Whether it is a folder of class folders that only has a table beside them."""
    return any(class_folders(base) for base in split_folders(path).values())


def _recipe(data: str) -> str:
    return "mnist" if _is_pixels(header_of(_files(data)["train"])) else "folder"


FORMAT = Format(
    about="a .csv of pixels (label,pixel0,...) or of image files (image,label)",
    recognizes=_recognizes,
    open=table,
    recipe=_recipe,
    rank=40,
)
