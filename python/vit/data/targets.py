"""Answers that are no class of a whole image: of every pixel a class or a depth, or key points; they move with it.

A new kind is a class with the methods of Targets, made by a data source and read by a task of the same `kind`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..support import affine
from .read import read_depth, read_mask

VOID = 255  # the value of a mask where there is no class


@dataclass(frozen=True)
class View:
    """What of a picture the model is shown: `place` says where each point of the view, `size` (width, height) wide and
    high, comes from."""

    place: affine.Map
    size: tuple[int, int]

    def of(self, picture: Image.Image, unknown: int) -> Image.Image:
        """The same part of another picture of that size, without blending its values; `unknown` beyond its border."""
        kind = Image.Transform.AFFINE
        return picture.transform(self.size, kind, self.place, Image.Resampling.NEAREST, fillcolor=unknown)


class Targets(Protocol):
    """The answers of all images of a Samples, in its order."""

    #: The name by which a task says what it learns from.
    kind: str

    def __len__(self) -> int: ...

    def tensor(self, index: int, view: View) -> Tensor:
        """What the task is given of an image of which the model sees `view`. DataError names what cannot be read."""

    def take(self, chosen: np.ndarray) -> Any:
        """Those of the images `chosen`, in that order."""

    def joined(self, others: Sequence[Any]) -> Any:
        """These and then those of `others`, of the same kind."""

    def digest(self) -> bytes:
        """What is other where the answers are others, as far as they are in memory."""


class Pictures:
    """A picture for each image: arrays [n, H, W] in memory, or the paths of image files."""

    kind: str

    def __init__(self, items: np.ndarray | Sequence[Path]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def take(self, chosen: np.ndarray) -> Any:
        items = self.items
        return type(self)(items[chosen] if isinstance(items, np.ndarray) else [items[i] for i in chosen])

    def joined(self, others: Sequence[Any]) -> Any:
        parts = [self.items, *(other.items for other in others)]
        if arrays := [part for part in parts if isinstance(part, np.ndarray)]:
            return type(self)(np.concatenate(arrays))
        return type(self)([path for part in parts for path in part])

    def tensor(self, index: int, view: View) -> Tensor:
        raise NotImplementedError

    def digest(self) -> bytes:
        return self.items.tobytes() if isinstance(self.items, np.ndarray) else b""


class Masks(Pictures):
    """The class of each pixel, uint8; VOID is of no class. -> int64 [H, W]."""

    kind = "masks"

    def picture(self, index: int) -> Image.Image:
        """The classes in mode L, at the size of the image."""
        item = self.items[index]
        return Image.fromarray(item) if isinstance(item, np.ndarray) else read_mask(item)

    def tensor(self, index: int, view: View) -> Tensor:
        return torch.from_numpy(np.asarray(view.of(self.picture(index), VOID)).astype(np.int64))


class Depths(Pictures):
    """How far away each pixel is, float32 or uint16; 0 where that is not known. -> float32 [H, W]."""

    kind = "depths"

    def picture(self, index: int) -> Image.Image:
        """The depths in mode F, at the size of the image."""
        item = self.items[index]
        return Image.fromarray(item.astype(np.float32)) if isinstance(item, np.ndarray) else read_depth(item)

    def tensor(self, index: int, view: View) -> Tensor:
        return torch.from_numpy(np.asarray(view.of(self.picture(index), 0)).copy())


@dataclass(frozen=True)
class LabelSets:
    """The classes of each image, of which there may be several or none: bool [n, classes]. -> float32 [classes]."""

    kind = "label_sets"

    there: np.ndarray

    def __len__(self) -> int:
        return len(self.there)

    def tensor(self, index: int, view: View) -> Tensor:
        return torch.from_numpy(self.there[index].astype(np.float32))

    def take(self, chosen: np.ndarray) -> LabelSets:
        return LabelSets(self.there[chosen])

    def joined(self, others: Sequence[LabelSets]) -> LabelSets:
        return LabelSets(np.concatenate([self.there, *(other.there for other in others)]))

    def digest(self) -> bytes:
        return hashlib.sha256(np.packbits(self.there).tobytes()).digest()


@dataclass(frozen=True)
class KeyPoints:
    """Points of one person, or thing, in each image.

    points: float64 [n, K, 3], x and y in pixels of the image (the middle of the first is 0.5) and how well the point is
        seen: 0 not labelled, 1 hidden, 2 seen
    sizes: float64 [n, 2], the square root of the area of what is in the image, and the longer side of its box
    spreads: float64 [K], of each point the deviation of what people mark, as a share of the first size: 2 sigma of COCO
    mirrored: int64 [K], which point takes the place of each in a mirror image: the left eye that of the right one

    -> float32 [K, 5]: x and y as shares of the view, how well it is seen (0 outside of it), spread and longer side as
    shares of the view's height.
    """

    kind = "key_points"

    points: np.ndarray
    sizes: np.ndarray
    spreads: np.ndarray
    mirrored: np.ndarray

    def __len__(self) -> int:
        return len(self.points)

    def tensor(self, index: int, view: View) -> Tensor:
        rows, (width, height) = self.points[index], view.size
        if affine.area(view.place) < 0:
            rows = rows[self.mirrored]
        places = affine.moved(view.place, rows[:, :2]) / (width, height)
        inside = ((places >= 0) & (places <= 1)).all(axis=1)
        root, side = self.sizes[index] / (affine.scale(view.place) * height)
        columns = (places, (rows[:, 2] * inside)[:, None], root * self.spreads[:, None], np.full((len(rows), 1), side))
        return torch.from_numpy(np.concatenate(columns, axis=1).astype(np.float32))

    def take(self, chosen: np.ndarray) -> KeyPoints:
        return replace(self, points=self.points[chosen], sizes=self.sizes[chosen])

    def joined(self, others: Sequence[KeyPoints]) -> KeyPoints:
        parts = [self, *others]
        points, sizes = (np.concatenate([getattr(part, name) for part in parts]) for name in ("points", "sizes"))
        return replace(self, points=points, sizes=sizes)

    def digest(self) -> bytes:
        found = hashlib.sha256()
        for array in (self.points, self.sizes, self.spreads, self.mirrored):
            found.update(np.ascontiguousarray(array).tobytes())
        return found.digest()
