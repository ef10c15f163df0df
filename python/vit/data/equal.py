"""Pictures that are in two splits: a model is then tested on what it has learned, and its figures say nothing of new
pictures."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..support.text import printable
from .samples import Samples
from .stored import Rows

MOST_BYTES = 1 << 30  # of an array on the disk that is read for this alone
_STRIP = 1 << 20  # bytes of a picture that are copied at once


def mark_of(image: Image.Image) -> int:
    """A number that equal pictures share: checksums (CRC-32, Adler-32) of mode, size, palette and pixels, 64 bits in
    all. It is 0 for none."""
    palette = image.getpalette() if image.mode in ("P", "PA") else None
    about = repr((image.mode, image.size, palette)).encode()
    first, second = zlib.crc32(about), zlib.adler32(about)
    rows = max(1, _STRIP // max(1, image.width * len(image.getbands())))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).tobytes()
        first, second = zlib.crc32(strip, first), zlib.adler32(strip, second)
    return first << 32 | second


def marks_of(samples: Samples) -> np.ndarray:
    """uint64 [n]: equal where pictures are; 0 where that is not known without reading them all once more."""
    if samples.marks is not None:
        return samples.marks
    images = samples.images
    if isinstance(images, np.ndarray):
        return _rows(images, range(len(images)))
    marks = np.zeros(len(samples), np.uint64)
    for number, store in enumerate(getattr(images, "stores", ())):
        if isinstance(store, Rows):
            here = np.flatnonzero(images.which == number)  # type: ignore[union-attr]
            marks[here] = _rows(store.array, images.places[here])  # type: ignore[union-attr]
    return marks


def _rows(array: np.ndarray, places: Sequence[int] | np.ndarray) -> np.ndarray:
    if isinstance(array, np.memmap) and array.nbytes > MOST_BYTES:
        return np.zeros(len(places), np.uint64)
    contents = (np.ascontiguousarray(array[place]).tobytes() for place in places)
    return np.array([zlib.crc32(content) << 32 | zlib.adler32(content) for content in contents], np.uint64)


@dataclass(frozen=True)
class Equal:
    """`count` of the `of` pictures of `split` are pictures of `other`, too; `names`: the first of them in both."""

    split: str
    other: str
    count: int
    of: int
    names: tuple[str, str]

    def __str__(self) -> str:
        first, second = map(printable, self.names)
        return f"{self.count:,} of {self.of:,} {self.split} images ({first} = {second})"


def shared_with_training(splits: Mapping[str, Samples]) -> list[Equal]:
    """What the other splits have of the training images."""
    if "train" not in splits:
        return []
    marks = {name: marks_of(splits[name]) for name in ("train", "val", "test") if name in splits}
    found = []
    for name in marks.keys() - {"train"}:
        known = (marks[name] != 0) & np.isin(marks[name], marks["train"])
        if known.any():
            first = int(known.argmax())
            other = int((marks["train"] == marks[name][first]).argmax())
            names = (splits[name].keys[first], splits["train"].keys[other])
            found.append(Equal(name, "train", int(known.sum()), len(known), names))
    return sorted(found, key=lambda one: one.split)


def repeated(samples: Samples) -> Equal | None:
    """Pictures that are in a split more than once: a part that is drawn from it has them on both sides."""
    marks = marks_of(samples)
    places = np.flatnonzero(marks)
    _, first, which = np.unique(marks[places], return_index=True, return_inverse=True)
    before = places[first][which]  # of each picture the first one that is equal
    again = np.flatnonzero(before != places)
    if not again.size:
        return None
    names = (samples.keys[places[again[0]]], samples.keys[before[again[0]]])
    return Equal("train", "train", int(again.size), len(samples), names)


def in_words(found: list[Equal]) -> str:
    """A line for people."""
    return f"equal pictures: {' and '.join(map(str, found))} are training images, too; their figures flatter the model"
