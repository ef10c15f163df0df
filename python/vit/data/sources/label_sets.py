"""CSV files that give image files several classes each, or none.

Either image,labels (or tags) with names between | or ; or , (of tags also between blanks), or a column of 0 and 1 for
each class beside the image: image,cat,dog,bird. A folder is read as one where it holds train.csv; test.csv and val.csv
beside it are those splits. Files packed with gzip are read, too.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...support.records import shown
from ..folder import check_of, describe, examined
from ..format import Format, Request, path_of
from ..layout import listed
from ..samples import DataError, Samples, Skipped, Source
from ..targets import LabelSets
from .csv_table import IMAGE, LABEL, header_of, image_file, lines_of

_NAMES = {"labels": r"[|;,]", "tags": r"[|;,\s]"}  # of the column, and what stands between the classes in it
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class _Row:
    """A line of a table: its number, the image's name in it, and the classes."""

    number: int
    image: str
    classes: list[str]


def _rows(path: Path) -> list[_Row] | None:
    """The lines of a table; None where it is no table of sets of classes. DataError names a line that cannot be."""
    names = header_of(path)
    header = [name.lower() for name in names]
    image = next((header.index(name) for name in IMAGE if name in header), None)
    if image is None or len(header) < 2:
        return None
    named = next((name for name in _NAMES if name in header), None)
    others = [place for place in range(len(header)) if place != image]
    if named is None and (len(others) < 2 or set(LABEL) & set(header)):
        return None
    found: list[_Row] = []
    reader = csv.reader(lines_of(path), strict=True)
    try:
        next(reader)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header) or not cells[image]:
                wanted = ",".join(names)
                raise DataError(f"vit: {path}, line {reader.line_num}: expected is {wanted}, got {shown(cells)}")
            if named:
                parts = [part.strip() for part in re.split(_NAMES[named], cells[header.index(named)])]
                there = list(filter(None, parts))
            else:
                values = [cells[place].strip() for place in others]
                if wrong := next((value for value in values if value not in ("0", "1", "0.0", "1.0")), None):
                    if not found:
                        return None
                    raise DataError(f"vit: {path}, line {reader.line_num}: {shown(wrong)} must be 0 or 1")
                there = [names[place] for place, value in zip(others, values, strict=True) if value[0] == "1"]
            found.append(_Row(reader.line_num, cells[image], there))
    except csv.Error as error:
        raise DataError(f"vit: {path}, line {reader.line_num}: {error}") from error
    if named and all(len(row.classes) == 1 for row in found):
        return None  # one class for each image, whatever the column is called
    return found


def label_sets(data: str, request: Request) -> Source:
    """The data set of a CSV file, or of the folder with train.csv. Images that cannot be read are left out and named,
    or refused as the request says. DataError for a class that training lacks."""
    paths = _files(data)
    tables = {split: _rows(path) or [] for split, path in paths.items()}
    classes = list(request.classes or sorted({name for row in tables["train"] for name in row.classes}))
    if len(classes) < 2:
        raise DataError(f"vit: {paths['train']} has the classes {classes}; two or more are needed")
    splits, skipped = {}, []
    for split, rows in tables.items():
        path = paths[split]
        there = np.zeros((len(rows), len(classes)), bool)
        for place, row in enumerate(rows):
            if unknown := [name for name in row.classes if name not in classes]:
                raise DataError(
                    f"vit: {path}, line {row.number}: {shown(unknown[0])} is none of the classes {listed(classes)}"
                )
            there[place, [classes.index(name) for name in row.classes]] = True
        files = [image_file(path, row.number, row.image) for row in rows]
        check = check_of(request.validate, path.parent, request.recorder)
        reasons, marks = examined(files, check, len(files), request.report)
        skipped += [Skipped(file, why) for file, why in zip(files, reasons, strict=True) if why]
        usable = [i for i, why in enumerate(reasons) if not why]
        keys = [files[i].relative_to(path.parent).as_posix() for i in usable]
        answers = LabelSets(there[usable])
        splits[split] = Samples(
            [files[i] for i in usable], np.zeros(len(usable), np.int64), keys, answers, marks[usable]
        )
    root = paths["train"]
    if skipped and request.bad_images == "refuse":
        raise DataError(f"vit: {describe(skipped, root.parent)}. Remove them, or use --bad-images skip")
    if not len(splits["train"]):
        raise DataError(f"vit: {root} names no usable image; {describe(skipped, root.parent)}")
    return Source(root.name.partition(".")[0], "label_sets", tuple(classes), splits, tuple(skipped))


def _files(data: str) -> dict[str, Path]:
    path = path_of(data)
    if not path.is_dir():
        return {"train": path} if path.is_file() and path.name.lower().endswith((".csv", ".csv.gz")) else {}
    files = {split: [path / f"{split}.csv{end}" for end in ("", ".gz")] for split in _SPLITS}
    return {split: found[0] for split, names in files.items() if (found := [file for file in names if file.is_file()])}


def _recognizes(data: str) -> bool:
    files = _files(data)
    return "train" in files and _rows(files["train"]) is not None


FORMAT = Format(
    about="a .csv with several classes per image (image,labels or a column of 0 and 1 for each)",
    recognizes=_recognizes,
    open=label_sets,
    recipe=lambda data: "label_sets",
    rank=39,
)
