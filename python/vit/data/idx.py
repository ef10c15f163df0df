"""MNIST-like data sets in IDX files, as published: images, labels, optionally compressed with gzip.

Format: two zero bytes, a type byte (8: uint8), the number of dimensions, each size as a big-endian uint32,
the data.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from .samples import DataError, Samples, Source

# The two spellings in circulation: with a hyphen as published, with a dot as some archives unpack.
PREFIXES = {"train": "train", "test": "t10k"}
KINDS = {"images": 3, "labels": 1}


def find(folder: Path, split: str, kind: str) -> Path | None:
    """The file of that split ("train", "test") and kind ("images", "labels") in `folder`, or None."""
    stem = f"{PREFIXES[split]}-{kind}"
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = folder / f"{stem}{separator}idx{KINDS[kind]}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def is_idx_folder(folder: Path) -> bool:
    """Whether `folder` holds any of the files this module reads."""
    return any(find(folder, split, kind) for split in PREFIXES for kind in KINDS)


def idx(folder: Path) -> Source:
    """The data set of a folder of IDX files; DataError names a file that is missing, damaged or
    inconsistent."""
    train = _pair(folder, "train")
    if train is None:
        raise DataError(f"vit: {folder} has no training files (train-images-idx3-ubyte[.gz] and its labels)")
    splits = {"train": train}
    test = _pair(folder, "test")
    if test is not None:
        splits["test"] = test
        if test.images[0].shape != train.images[0].shape:  # type: ignore[union-attr]
            sizes = [tuple(s.images[0].shape) for s in splits.values()]  # type: ignore[union-attr]
            raise DataError(f"vit: in {folder} the training images are {sizes[0]} and the test images {sizes[1]}")
    classes = 1 + max(int(samples.labels.max()) for samples in splits.values())
    if classes < 2:
        raise DataError(f"vit: every label in {folder} is 0; two classes or more are needed")
    return Source(folder.name, "mnist", tuple(str(i) for i in range(classes)), splits)


def _pair(folder: Path, split: str) -> Samples | None:
    paths = {kind: find(folder, split, kind) for kind in KINDS}
    if not any(paths.values()):
        return None
    images_path, labels_path = paths["images"], paths["labels"]
    if images_path is None or labels_path is None:
        kind = "labels" if labels_path is None else "images"
        raise DataError(f"vit: {folder} lacks {PREFIXES[split]}-{kind}-idx{KINDS[kind]}-ubyte[.gz]")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"vit: {images_path} holds {len(images)} images but {labels_path} {len(labels)} labels")
    if not len(images):
        raise DataError(f"vit: {images_path} holds no images")
    return Samples(images, labels.astype(np.int64), [f"{split}-{i}" for i in range(len(labels))])


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of one IDX file, checked: type, number of dimensions, exact length."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"vit: cannot read {path}: {error}") from error
    expected = bytes([0, 0, 8, dimensions])
    if data[:4] != expected:
        raise DataError(
            f"vit: {path} is not an IDX file of uint8 with {dimensions} dimension(s): it starts with "
            f"{data[:4].hex() or 'nothing'}, expected {expected.hex()}"
        )
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise DataError(f"vit: {path} is cut off inside its header ({len(data)} bytes)")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if dimensions == 3 and 0 in shape[1:]:
        raise DataError(f"vit: {path} says its images are {shape[1]} x {shape[2]} pixels")
    count = int(np.prod(shape, dtype=np.uint64)) if 0 not in shape else 0
    if len(data) - header != count:
        raise DataError(
            f"vit: {path} says {' x '.join(map(str, shape))} = {count} bytes, but {len(data) - header} "
            "follow the header"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
