"""Folders for segmentation: images/ and masks/ with files of the same names, below train/, val/ and test/ or not.

The value of a mask's pixel (grey, or the number in a palette) is its class; 255 is of no class. classes.txt names the
classes, a line each, from 0; without it they are called by their numbers. images/train and masks/train, as ADE20K has
them, are read as well.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...support.images import opened
from ..folder import check_of, describe, images_below, reasons_against
from ..format import Format, Request, path_of
from ..layout import SPLITS
from ..samples import DataError, Samples, Skipped, Source, read_mask

_IMAGES = ("images", "image", "imgs", "img", "jpegimages")
_MASKS = ("masks", "mask", "annotations", "segmentationclass", "labels")

Pair = tuple[Path, Path]  # folders of images and of their masks


def _pair(root: Path) -> Pair | None:
    if not root.is_dir():
        return None
    found = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    images, masks = (next((found[name] for name in names if name in found), None) for names in (_IMAGES, _MASKS))
    return (images, masks) if images and masks else None


def _splits(root: Path) -> dict[str, Pair]:
    """Split -> its folders of images and masks."""
    below = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    pairs = {
        split: pair
        for split, names in SPLITS.items()
        for name in names
        if name in below and (pair := _pair(below[name]))
    }
    if pairs or not (both := _pair(root)):
        return pairs
    inside = [{entry.name.lower(): entry for entry in part.iterdir() if entry.is_dir()} for part in both]
    parts = {
        split: (inside[0][name], inside[1][name])
        for split, names in SPLITS.items()
        for name in names
        if name in inside[0] and name in inside[1]
    }
    return parts or {"train": both}


def mask_folders(root: Path, request: Request) -> Source:
    """The data set in `root`. Images without a mask, or with one that cannot be, are left out and named, or refused as
    the request says. Raises DataError for a class without a name."""
    names = _class_names(root)
    check = check_of(request.validate, root, request.recorder)
    skipped: list[Skipped] = []
    found: dict[str, list[Pair]] = {}
    most = -1
    for split, (images, masks) in _splits(root).items():
        files, others = images_below(images)
        skipped += others
        of_name = {path.relative_to(masks).with_suffix(""): path for path in images_below(masks)[0]}
        pairs = [(path, of_name.get(path.relative_to(images).with_suffix(""))) for path in files]
        reasons = reasons_against(files, check, len(files), request.report)
        found[split] = []
        for (image, mask), why in zip(pairs, reasons, strict=True):
            largest = -1
            if mask is None:
                why = why or f"there is no mask of its name in {masks}"
            elif not why:
                why, largest = _examined(image, mask, names)
            if why or mask is None:
                skipped.append(Skipped(image, why))
                continue
            most = max(most, largest)
            found[split].append((image, mask))
    if skipped and request.bad_images == "refuse":
        raise DataError(f"vit: {describe(skipped, root)}. Remove them, or use --bad-images skip")
    if not any(found.values()):
        raise DataError(f"vit: {root} has no usable image with a mask; {describe(skipped, root)}")
    classes = tuple(names or (str(number) for number in range(most + 1)))
    if request.classes is not None and names is None:
        classes = tuple(request.classes)  # the numbers are the model's
        if most >= len(classes):
            raise DataError(f"vit: {root} has the class {most}; the model knows 0 to {len(classes) - 1}")
    if len(classes) < 2:
        raise DataError(f"vit: every pixel in the masks of {root} is of one class; two or more are needed")
    splits = {split: _samples(root, pairs) for split, pairs in found.items()}
    return Source(root.resolve().name, "mask_folders", classes, splits, tuple(skipped))


def _samples(root: Path, pairs: list[Pair]) -> Samples:
    keys = [image.relative_to(root).as_posix() for image, _ in pairs]
    images, masks = [image for image, _ in pairs], [mask for _, mask in pairs]
    return Samples(images, np.zeros(len(pairs), np.int64), keys, masks)


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
        found = read_mask(mask)
        with opened(image) as picture:
            size = picture.size
    except (DataError, OSError) as error:
        return str(error).removeprefix("vit: "), -1
    if found.size != size:
        return f"its mask is {found.width} x {found.height}, the image {size[0]} x {size[1]}", -1
    values = np.asarray(found)
    known = values[values != 255]
    largest = int(known.max()) if known.size else -1
    if names is not None and largest >= len(names):
        return f"its mask has the class {largest}; classes.txt names 0 to {len(names) - 1} (255 is none)", largest
    return "", largest


def _recognizes(data: str) -> bool:
    root = path_of(data)
    return root.is_dir() and bool(_splits(root))


FORMAT = Format(
    about="images/ and masks/ (segmentation)",
    recognizes=_recognizes,
    open=lambda data, request: mask_folders(path_of(data), request),
    recipe=lambda data: "masks",
    rank=40,
)
