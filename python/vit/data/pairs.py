"""Folders of images beside a folder with a picture for each: masks, depths. Files of the same names belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..support.images import opened
from .folder import check_of, describe, examined, images_below
from .format import Request
from .layout import SPLITS
from .samples import DataError, Samples, Skipped
from .targets import Pictures

IMAGES = ("images", "image", "imgs", "img", "rgb", "jpegimages")

Pair = tuple[Path, Path]  # of an image and its picture, or of their folders
Marked = tuple[Path, Path, int]  # and the mark of the image (vit.data.equal)


def splits_of(root: Path, others: Sequence[str]) -> dict[str, Pair]:
    """Split -> its folders of images and of pictures, whose names are among `others`: below train/, val/ and test/, or
    with these in them (images/train, masks/train), or without."""
    if not root.is_dir():
        return {}
    below = _folders(root)
    pairs = {
        split: pair
        for split, names in SPLITS.items()
        for name in names
        if name in below and (pair := _pair(below[name], others))
    }
    if pairs or not (both := _pair(root, others)):
        return pairs
    inside = [_folders(part) for part in both]
    parts = {
        split: (inside[0][name], inside[1][name])
        for split, names in SPLITS.items()
        for name in names
        if name in inside[0] and name in inside[1]
    }
    return parts or {"train": both}


def usable_pairs(
    root: Path, splits: dict[str, Pair], request: Request, what: str, examine: Callable[[Path, Path], str]
) -> tuple[dict[str, list[Marked]], list[Skipped]]:
    """The images of each split with their pictures, and those that are left out: without a picture, unreadable, or
    because of what `examine` says of the two ("" of those that are sound). Raises DataError where the request refuses
    these, and where nothing is left."""
    check = check_of(request.validate, root, request.recorder)
    skipped: list[Skipped] = []
    found: dict[str, list[Marked]] = {}
    for split, (images, others) in splits.items():
        files, ignored = images_below(images)
        skipped += ignored
        of_name = {path.relative_to(others).with_suffix(""): path for path in images_below(others)[0]}
        found[split] = []
        for image, why, mark in zip(files, *examined(files, check, len(files), request.report), strict=True):
            other = of_name.get(image.relative_to(images).with_suffix(""))
            if not why:
                why = f"there is no {what} of its name in {others}" if other is None else examine(image, other)
            if why or other is None:
                skipped.append(Skipped(image, why))
            else:
                found[split].append((image, other, int(mark)))
    if skipped and request.bad_images == "refuse":
        raise DataError(f"vit: {describe(skipped, root)}. Remove them, or use --bad-images skip")
    if not any(found.values()):
        raise DataError(f"vit: {root} has no usable image with a {what}; {describe(skipped, root)}")
    return found, skipped


def samples_of(root: Path, pairs: Sequence[Marked], kind: type[Pictures]) -> Samples:
    """The pairs as samples with targets of that kind."""
    keys = [image.relative_to(root).as_posix() for image, *_ in pairs]
    images, others = [image for image, *_ in pairs], [other for _, other, _ in pairs]
    marks = np.array([mark for *_, mark in pairs], np.uint64)
    return Samples(images, np.zeros(len(pairs), np.int64), keys, kind(others), marks)


def size_of(image: Path) -> tuple[int, int]:
    """Width and height, from the header."""
    with opened(image) as picture:
        size: tuple[int, int] = picture.size
        return size


def _folders(root: Path) -> dict[str, Path]:
    return {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}


def _pair(root: Path, others: Sequence[str]) -> Pair | None:
    found = _folders(root)
    images, pictures = (next((found[name] for name in names if name in found), None) for names in (IMAGES, others))
    return (images, pictures) if images and pictures else None
