"""Folders for segmentation: images/ and masks/ with files of the same names, below train/, val/ and test/ or not.

The value of a mask's pixel (grey, or the number in a palette) is its class; 255 is of no class. classes.txt names the
classes, a line each, from 0; without it they are called by their numbers. images/train and masks/train, as ADE20K has
them, are read as well.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..format import Format, Request, path_of
from ..pairs import samples_of, size_of, splits_of, usable_pairs
from ..read import DataError, read_mask
from ..samples import Source
from ..targets import VOID, Masks

_MASKS = ("masks", "mask", "annotations", "segmentationclass", "labels")


def mask_folders(root: Path, request: Request) -> Source:
    """The data set in `root`. Images without a mask, or with one that cannot be, are left out and named, or refused as
    the request says. Raises DataError for a class without a name."""
    names = _class_names(root)
    most = -1

    def examine(image: Path, mask: Path) -> str:
        nonlocal most
        why, largest = _examined(image, mask, names)
        most = max(most, -1 if why else largest)
        return why

    found, skipped = usable_pairs(root, splits_of(root, _MASKS), request, "mask", examine)
    classes = tuple(names or (str(number) for number in range(most + 1)))
    if request.classes is not None and names is None:
        classes = tuple(request.classes)  # the numbers are the model's
        if most >= len(classes):
            raise DataError(f"vit: {root} has the class {most}; the model knows 0 to {len(classes) - 1}")
    if len(classes) < 2:
        raise DataError(f"vit: every pixel in the masks of {root} is of one class; two or more are needed")
    splits = {split: samples_of(root, pairs, Masks) for split, pairs in found.items()}
    return Source(root.resolve().name, "mask_folders", classes, splits, tuple(skipped))


def _class_names(root: Path) -> list[str] | None:
    path = root / "classes.txt"
    if not path.is_file():
        return None
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"vit: cannot read {path}: {error}") from error
    if len(set(names)) < max(len(names), 2) or len(names) > 255:
        raise DataError(f"vit: {path} has {len(names)} lines; 2 to 255 different names are needed, one for each class")
    return names


def _examined(image: Path, mask: Path, names: list[str] | None) -> tuple[str, int]:
    """Why a mask does not go with its image, or ""; and the largest class in it, -1 where there is none."""
    try:
        found, size = read_mask(mask), size_of(image)
    except (DataError, OSError) as error:
        return str(error).removeprefix("vit: "), -1
    if found.size != size:
        return f"its mask is {found.width} x {found.height}, the image {size[0]} x {size[1]}", -1
    values = np.asarray(found)
    known = values[values != VOID]
    largest = int(known.max()) if known.size else -1
    if names is not None and largest >= len(names):
        return f"its mask has the class {largest}; classes.txt names 0 to {len(names) - 1} (255 is none)", largest
    return "", largest


FORMAT = Format(
    about="images/ and masks/ (segmentation)",
    recognizes=lambda data: bool(splits_of(path_of(data), _MASKS)),
    open=lambda data, request: mask_folders(path_of(data), request),
    recipe=lambda data: "masks",
    rank=40,
)
