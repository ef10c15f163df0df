"""Arrays of NumPy: an .npz with x_train, y_train, x_test ..., or a folder of .npy files with such names.

A name says the split (train, val, test; without one: train) and what it is: images (x, images, data) or labels (y,
labels, targets). Images are [n, H, W], [n, H, W, 1 or 3] or [n, 1 or 3, H, W]; uint8, or other numbers that are 0 to
255 or 0.0 to 1.0. An .npy of uint8 stays on the disk until an image is asked for. Nothing is unpickled.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..format import Format, Request, names_in, path_of
from ..labels import by_values
from ..layout import split_word
from ..samples import DataError, Samples, Source
from ..stored import Rows, Stored

_IMAGES = {"x", "images", "image", "imgs", "img", "data", "samples"}
_LABELS = {"y", "labels", "label", "targets", "target"}

Place = tuple[str, str]  # split, "images" or "labels"


def _place(name: str) -> Place | None:
    """x_train, train_images, X_test.npy, labels -> its split and what it is; None for other names."""
    words = [word.lower() for word in re.split(r"[^A-Za-z]+", name.removesuffix(".npy")) if word]
    split = next((found for word in words if (found := split_word(word))), "train")
    kinds = {"images" for word in words if word in _IMAGES} | {"labels" for word in words if word in _LABELS}
    return (split, kinds.pop()) if len(kinds) == 1 else None


def arrays(path: Path, request: Request) -> Source:
    """The data set in an .npz file or in a folder of .npy files."""
    found: dict[Place, tuple[str, Any]] = {}
    for name, array in _arrays_in(path):
        if (place := _place(name)) is None:
            continue
        if place in found:
            raise DataError(f"vit: {path} has two arrays of {place[0]} {place[1]}: {found[place][0]} and {name}")
        found[place] = (name, array)
    splits = {}
    for split in dict.fromkeys(split for split, _ in found):
        for kind in ("images", "labels"):
            if (split, kind) not in found:
                raise DataError(f"vit: {path} has no {kind} of the {split} split; there are {_listed(found)}")
        splits[split] = _samples(path, split, found[split, "images"], found[split, "labels"])
    if not splits:
        raise DataError(f"vit: {path} has no array that is called like x_train, train_images, labels or y_test")
    return by_values(path.stem, "arrays", splits, path, request)


def _listed(found: dict[Place, tuple[str, Any]]) -> str:
    return ", ".join(name for name, _ in found.values())


def _arrays_in(path: Path) -> list[tuple[str, Any]]:
    try:
        if path.is_dir():
            files = [entry for entry in sorted(path.iterdir()) if entry.suffix == ".npy" and _place(entry.name)]
            return [(entry.name, _load(entry, mmap_mode="r")) for entry in files]
        with _load(path) as archive:
            return [(name, archive[name]) for name in archive.files if _place(name)]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, MemoryError, SyntaxError) as error:
        if isinstance(error, DataError):
            raise
        if "Object arrays" in str(error):
            raise DataError(f"vit: {path} holds Python objects, not numbers; save it as an array of numbers") from error
        raise DataError(f"vit: cannot read {path}: {str(error).splitlines()[0] if str(error) else error!r}") from error


def _load(path: Path, **options: Any) -> Any:
    return np.load(path, allow_pickle=False, **options)


def _samples(path: Path, split: str, images: tuple[str, Any], labels: tuple[str, Any]) -> Samples:
    pixels = _pixels(f"{path}: {images[0]}", images[1])
    numbers = _labels(f"{path}: {labels[0]}", labels[1])
    if len(pixels) != len(numbers):
        raise DataError(f"vit: {path}: {images[0]} has {len(pixels)} images but {labels[0]} {len(numbers)} labels")
    keys = [f"{split}-{i}" for i in range(len(numbers))]
    return Samples(Stored.of(Rows(pixels, f"{path}: {images[0]}"), len(pixels)), numbers, keys)


def _labels(where: str, values: np.ndarray) -> np.ndarray:
    """int64 [n] of [n] or [n, 1]; one-hot [n, classes] is counted."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if (
        values.ndim == 2
        and np.array_equal(values.sum(axis=1), np.ones(len(values)))
        and set(np.unique(values)) <= {0, 1}
    ):
        values = values.argmax(axis=1)
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        shape = " x ".join(map(str, values.shape))
        raise DataError(f"vit: {where} is {shape} of {values.dtype}; labels are n whole numbers, n x 1 or one-hot")
    whole = values.astype(np.int64) if values.dtype.kind != "f" or np.isfinite(values).all() else None
    if whole is None or (values.dtype.kind == "f" and not np.array_equal(whole, values)):
        raise DataError(f"vit: {where} has labels that are no whole numbers")
    return whole


def _pixels(where: str, values: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W] or [n, H, W, 3]."""
    if values.ndim == 4 and values.shape[-1] not in (1, 3) and values.shape[1] in (1, 3):
        values = values.transpose(0, 2, 3, 1)
    if values.ndim == 4 and values.shape[-1] == 1:
        values = values[..., 0]
    good = values.ndim == 3 or (values.ndim == 4 and values.shape[-1] == 3)
    if not good or 0 in values.shape or values.dtype.kind not in "biuf":
        raise DataError(
            f"vit: {where} is {' x '.join(map(str, values.shape))} of {values.dtype}; images are n x H x W, n x H x W "
            "x 1 or 3, or n x 1 or 3 x H x W"
        )
    if values.dtype == np.uint8:
        return values
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 255:
        raise DataError(f"vit: {where} has values from {low} to {high}; allowed is 0 to 255, or 0.0 to 1.0")
    scale = 255.0 if values.dtype.kind in "bf" and high <= 1 else 1.0
    return np.rint(values * scale).astype(np.uint8)


def _recognizes(data: str) -> bool:
    path = path_of(data)
    if path.is_dir():
        return any(name.endswith(".npy") and _place(name) for name in names_in(data))
    return path.is_file() and path.suffix == ".npz"


def _recipe(data: str) -> str:
    """By the size and colour of the images."""
    source = arrays(path_of(data), Request(classes=()))
    image = next(iter(source.splits.values())).image(0)
    if max(image.size) > 64:
        return "folder"
    return "mnist" if image.mode == "L" else "cifar"


FORMAT = Format(
    about="an .npz or a folder of .npy files (x_train, y_train, x_test, ...)",
    recognizes=_recognizes,
    open=lambda data, request: arrays(path_of(data), request),
    recipe=_recipe,
    rank=30,
)
