"""MNIST-like data sets in IDX files, as published: images, labels, optionally compressed with gzip.

Format: two zero bytes, a type byte (8: uint8), the number of dimensions, each size as a big-endian uint32,
the data.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..support.text import printable
from .format import Request
from .labels import by_values
from .samples import DataError, Samples, Source

PREFIXES = {"train": "train", "test": "t10k"}
KINDS = {"images": 3, "labels": 1}

#: What the files are called: with a hyphen as published, with a dot as some archives unpack; in any case of letters.
_NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx([13])-ubyte(\.gz)?", re.IGNORECASE)

#: Files of other sets of this format (emnist-letters-train-images-idx3-ubyte, qmnist-test-labels-idx2-int).
_ALIKE = re.compile(r".*[-.]idx\d-(ubyte|int)(\.gz)?", re.IGNORECASE)

#: A byte of gzip stands for at most so many.
_MOST_PACKED = 1032


def find(folder: Path, split: str, kind: str) -> Path | None:
    """The file of that split ("train", "test") and kind ("images", "labels") in `folder`, or None.

    Of a plain and a compressed file the plain one. Raises DataError for t10k- and test- files beside each other.
    """
    found = []
    for path in _files(folder, _NAME):
        prefix, what, dimensions, packed = _NAME.fullmatch(path.name).groups()  # type: ignore[union-attr]
        named = "train" if prefix.lower() == "train" else "test"
        if (named, what.lower(), int(dimensions)) == (split, kind, KINDS[kind]):
            found.append((bool(packed), path.name, path))
    found.sort()
    prefixes = {path.name[:4].lower() for _, _, path in found}
    if len(prefixes) > 1:
        raise DataError(f"vit: {folder} has both {found[0][1]} and {found[-1][1]}; keep one of them")
    return found[0][2] if found else None


def is_idx_folder(folder: Path) -> bool:
    """Whether `folder` holds IDX files, by their names."""
    return bool(_files(folder, _ALIKE))


def _files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name) and path.is_file()]


def _refuse_others(folder: Path) -> None:
    """Images that are not read, beside those that are, would be missed by nobody until the figures are."""
    if others := [path.name for path in _files(folder, _ALIKE) if not _NAME.fullmatch(path.name)]:
        raise DataError(
            f"vit: {folder} has {printable(others[0])}, which is none of train-images-idx3-ubyte[.gz], "
            "train-labels-idx1-ubyte[.gz], t10k-... or test-...; rename it or move it away"
        )


def idx(folder: Path, report: Callable[[str], None] | None = None, complete: bool = True) -> Source:
    """The data set of a folder of IDX files; its classes are the labels that occur, named by their numbers.

    report: called with a line of text when the labels have gaps, as one wrong label makes them
    complete: there must be training images, of every class; False for images to evaluate
    Raises DataError for a file that is missing, damaged or inconsistent.
    """
    _refuse_others(folder)
    splits = {split: samples for split in PREFIXES if (samples := _pair(folder, split))}
    if complete and "train" not in splits:
        raise DataError(f"vit: {folder} has no training files (train-images-idx3-ubyte[.gz] and its labels)")
    sizes = {split: tuple(samples.images[0].shape) for split, samples in splits.items()}  # type: ignore[union-attr]
    if len(set(sizes.values())) > 1:
        raise DataError(
            f"vit: in {folder} the training images are {sizes['train']} and the test images {sizes['test']}"
        )
    return by_values(folder.name, "mnist", splits, folder, Request(report=report, classes=None if complete else ()))


def _pair(folder: Path, split: str) -> Samples | None:
    paths = {kind: find(folder, split, kind) for kind in KINDS}
    if not any(paths.values()):
        return None
    images_path, labels_path = paths["images"], paths["labels"]
    if images_path is None or labels_path is None:
        kind = "labels" if labels_path is None else "images"
        raise DataError(f"vit: {folder} lacks {PREFIXES[split]}-{kind}-idx{KINDS[kind]}-ubyte[.gz]")
    labels = read_idx(labels_path, 1)  # first: it is small, and says how many images there must be
    images = read_idx(images_path, 3, (len(labels), labels_path))
    if not len(images):
        raise DataError(f"vit: {images_path} holds no images")
    return Samples(images, labels.astype(np.int64), [f"{split}-{i}" for i in range(len(labels))])


def read_idx(path: Path, dimensions: int, labels: tuple[int, Path] | None = None) -> np.ndarray:
    """The uint8 array of one IDX file, checked: type, number of dimensions, exact length.

    labels: how many there are for its images, and in which file. The header is read first, and never more than it says.
    """
    try:
        with open(path, "rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            size = os.fstat(plain.fileno()).st_size
            file = gzip.GzipFile(fileobj=plain) if packed else plain
            shape = _read_shape(file, path, dimensions)
            if labels and shape[0] != labels[0]:
                raise DataError(f"vit: {path} holds {shape[0]} images but {labels[1]} {labels[0]} labels")
            return _read_array(file, path, shape, size, packed)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"vit: cannot read {path}: {error}") from error


def _read_shape(file: BinaryIO | gzip.GzipFile, path: Path, dimensions: int) -> tuple[int, ...]:
    length = 4 + 4 * dimensions
    head = file.read(length)
    expected = bytes([0, 0, 8, dimensions])
    if head[:4] != expected:
        raise DataError(
            f"vit: {path} is not an IDX file of uint8 with {dimensions} dimension(s): it starts with "
            f"{head[:4].hex() or 'nothing'}, expected {expected.hex()}"
        )
    if len(head) < length:
        raise DataError(f"vit: {path} is cut off inside its header ({len(head)} bytes)")
    shape = struct.unpack(f">{dimensions}I", head[4:])
    if dimensions == 3 and 0 in shape[1:]:
        raise DataError(f"vit: {path} says its images are {shape[1]} x {shape[2]} pixels")
    return shape


def _read_array(
    file: BinaryIO | gzip.GzipFile, path: Path, shape: tuple[int, ...], size: int, packed: bool
) -> np.ndarray:
    """What follows the header in a file of `size` bytes."""
    count, behind = math.prod(shape), size - 4 - 4 * len(shape)
    says = f"vit: {path} says {' x '.join(map(str, shape))} = {count} bytes, but"
    if not packed and count != behind:
        raise DataError(f"{says} {behind} follow the header")
    if count > size * _MOST_PACKED:
        raise DataError(f"{says} {size} bytes of gzip cannot hold so many")
    try:
        data = np.empty(count, dtype=np.uint8)
    except MemoryError as error:
        raise DataError(f"{says} there is not enough memory for them") from error
    done = 0
    while done < count and (part := file.read(min(count - done, 1 << 20))):
        data[done : done + len(part)] = np.frombuffer(part, dtype=np.uint8)
        done += len(part)
    if done < count:
        raise DataError(f"{says} {done} follow the header")
    if file.read(1):  # at its end, gzip compares the checksum
        raise DataError(f"{says} more follow the header")
    return data.reshape(shape)
