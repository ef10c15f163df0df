"""Training-time changes to images. Each takes a PIL image and a random generator and returns a PIL image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image, ImageEnhance
from torch import Tensor

from ..support import affine
from ..support.random import Stream


class Augment(Protocol):
    """A random change of one image; `resizes` says that it also brings the image to the model's size."""

    @property
    def resizes(self) -> bool: ...

    def __call__(self, image: Image.Image, rng: Stream) -> Image.Image: ...

    def place(self, size: tuple[int, int], rng: Stream) -> affine.Map:
        """Where each place of the result comes from in an image of that `size` (width, height), with the random numbers
        that the image is given: by this its mask or its key points move along."""


@dataclass(frozen=True)
class Affine:
    """A small rotation, shear, scaling and shift about the image's centre; what enters at the border is
    `fill`.

    rotate and shear in degrees, scale and shift as fractions of the image's size; each is drawn uniformly
    from [-value, value].
    """

    resizes: ClassVar[bool] = False

    rotate: float = 8.0
    shear: float = 5.0
    scale: float = 0.1
    shift: float = 0.06
    fill: int = 0

    def __call__(self, image: Image.Image, rng: Stream) -> Image.Image:
        kind = Image.Transform.AFFINE
        place = self.place(image.size, rng)
        return image.transform(image.size, kind, place, Image.Resampling.BILINEAR, fillcolor=self.fill)

    def place(self, size: tuple[int, int], rng: Stream) -> affine.Map:
        """p = A (q - centre) + centre + shift."""
        angle, shear, scale, right, down = rng.uniform(-1.0, 1.0, 5).tolist()
        angle, shear = math.radians(self.rotate * angle), math.tan(math.radians(self.shear * shear))
        scale = 1.0 / (1.0 + self.scale * scale)
        width, height = size
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        a, b, d, e = cos, sin + shear * cos, -sin, cos - shear * sin
        x, y = width / 2, height / 2
        c = x - a * x - b * y + self.shift * right * width
        f = y - d * x - e * y + self.shift * down * height
        # Sines and cosines differ in the last bit from one C library to another.
        a, b, c, d, e, f = (round(value, 12) for value in (a, b, c, d, e, f))
        return a, b, c, d, e, f


@dataclass(frozen=True)
class Elastic:
    """An affine change, and a bend: the knots of a grid of `cells` x `cells` move, and the image between them goes
    along bilinearly, as a hand draws a stroke a little longer or rounder (Simard 2003 moves every pixel, and smooths).

    base: what it begins with; bend: how far a knot moves at most, as a fraction of the image's size, drawn uniformly
        in both directions
    """

    resizes: ClassVar[bool] = False

    base: Affine = Affine(rotate=12.0, shear=12.0, scale=0.15, shift=0.08)
    bend: float = 0.05
    cells: int = 4

    def __call__(self, image: Image.Image, rng: Stream) -> Image.Image:
        width, height = image.size
        place = self.base.place(image.size, rng)
        knots = self.cells + 1
        moves = rng.uniform(-self.bend, self.bend, (knots, knots, 2)).tolist()
        across = [width * i // self.cells for i in range(knots)]
        down = [height * i // self.cells for i in range(knots)]
        even = affine.found(place, np.array([(x, y) for y in down for x in across], np.float64))
        source = (even.reshape(knots, knots, 2) + np.array(moves) * (width, height)).tolist()
        cells = [
            (
                (across[i], down[j], across[i + 1], down[j + 1]),
                (*source[j][i], *source[j + 1][i], *source[j + 1][i + 1], *source[j][i + 1]),
            )
            for j in range(self.cells)
            for i in range(self.cells)
            # An image may have fewer pixels than there are cells.
            if across[i] < across[i + 1] and down[j] < down[j + 1]
        ]
        kind = Image.Transform.MESH
        return image.transform(image.size, kind, cells, Image.Resampling.BILINEAR, fillcolor=self.base.fill)

    def place(self, size: tuple[int, int], rng: Stream) -> affine.Map:
        """That of the affine change: answers that are places in the image are refused with a bend."""
        return self.base.place(size, rng)


@dataclass(frozen=True)
class CropFlip:
    """A random part of the image (area and aspect ratio drawn), resized to `size`, and a mirror image half
    the time.

    size: (height, width) of the result; area: smallest part of the image's area; aspect: widest width /
        height ratio
    """

    resizes: ClassVar[bool] = True

    size: tuple[int, int]
    area: float = 0.35
    aspect: float = 4 / 3
    flip: bool = True

    def __call__(self, image: Image.Image, rng: Stream) -> Image.Image:
        box, mirrored = self._box(image.size, rng)
        image = image.resize(self.size[::-1], Image.Resampling.BICUBIC, box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image

    def place(self, size: tuple[int, int], rng: Stream) -> affine.Map:
        (left, top, right, bottom), mirrored = self._box(size, rng)
        height, width = self.size
        part = affine.window(left, top, (right - left) / width, (bottom - top) / height)
        return affine.after(part, (-1.0, 0.0, float(width), 0.0, 1.0, 0.0)) if mirrored else part

    def _box(self, size: tuple[int, int], rng: Stream) -> tuple[tuple[int, int, int, int], bool]:
        """The part that is taken, and whether it is mirrored."""
        area, aspect, left, top, mirror = rng.uniform(0.0, 1.0, 5).tolist()
        width, height = size
        target = width * height * (self.area + (1.0 - self.area) * area)
        ratio = math.exp((2.0 * aspect - 1.0) * math.log(self.aspect))
        w = min(width, max(1, round(math.sqrt(target * ratio))))
        h = min(height, max(1, round(math.sqrt(target / ratio))))
        x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
        return (x, y, min(width, x + w), min(height, y + h)), self.flip and mirror < 0.5


@dataclass(frozen=True)
class Changes:
    """What is done with an image beside, and after, another augmentation: a rotation, mirror images, other colours.

    base: the other one, if any; size: (height, width) to which it brings the image, where it `resizes`
    rotate: degrees, drawn from [-rotate, rotate]; what enters at the border is black
    hflip, vflip: probabilities of a mirror image, left for right and upside down
    jitter: brightness, contrast and saturation are multiplied by factors drawn from [1 - jitter, 1 + jitter], in this
        order; hue: shift of the hue, drawn from [-hue, hue] turns; grey: probability that all colours go
    """

    base: Augment | None = None
    size: tuple[int, int] = (0, 0)
    rotate: float = 0.0
    hflip: float = 0.0
    vflip: float = 0.0
    jitter: float = 0.0
    hue: float = 0.0
    grey: float = 0.0

    @property
    def resizes(self) -> bool:
        """That of the other augmentation."""
        return self.base is not None and self.base.resizes

    def __call__(self, image: Image.Image, rng: Stream) -> Image.Image:
        own = self._own(rng)
        if self.base:
            image = self.base(image, rng)
        turned, mirrored = self._moves(image.size, own)
        if self.rotate:
            kind = Image.Transform.AFFINE
            image = image.transform(image.size, kind, turned, Image.Resampling.BILINEAR, fillcolor=0)
        for flip, way in zip(mirrored, (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM), strict=True):
            image = image.transpose(way) if flip else image
        return self._coloured(image, own)

    def place(self, size: tuple[int, int], rng: Stream) -> affine.Map:
        own = self._own(rng)
        place = self.base.place(size, rng) if self.base else affine.IDENTITY
        width, height = shown = self.size[::-1] if self.resizes else size
        turned, (across, down) = self._moves(shown, own)
        if self.rotate:
            place = affine.after(place, turned)
        if across:
            place = affine.after(place, (-1.0, 0.0, float(width), 0.0, 1.0, 0.0))
        return affine.after(place, (1.0, 0.0, 0.0, 0.0, -1.0, float(height))) if down else place

    @staticmethod
    def _own(rng: Stream) -> Stream:
        """The numbers of these changes, drawn before the other augmentation's: how many that takes does not matter."""
        return Stream("changes", int(rng.integers(0, 1 << 62, 1)[0]))

    def _moves(self, size: tuple[int, int], own: Stream) -> tuple[affine.Map, tuple[bool, bool]]:
        """The rotation of an image of that size, and in which ways it is mirrored."""
        turned = Affine(self.rotate, 0.0, 0.0, 0.0).place(size, own)
        across, down = own.uniform(0.0, 1.0, 2).tolist()
        return turned, (across < self.hflip, down < self.vflip)

    def _coloured(self, image: Image.Image, own: Stream) -> Image.Image:
        *factors, turn, chance = own.uniform(-1.0, 1.0, 5).tolist()
        if self.jitter:
            enhancers: list[Any] = [ImageEnhance.Brightness, ImageEnhance.Contrast]
            enhancers += [ImageEnhance.Color] if image.mode == "RGB" else []
            for enhancer, factor in zip(enhancers, factors, strict=False):
                image = enhancer(image).enhance(max(0.0, 1.0 + self.jitter * factor))
        if self.hue and image.mode == "RGB":
            hue, *rest = image.convert("HSV").split()
            moved = (np.asarray(hue).astype(np.int64) + int(255 * self.hue * turn)) % 256
            image = Image.merge("HSV", (Image.fromarray(moved.astype(np.uint8)), *rest)).convert("RGB")
        if (chance + 1) / 2 < self.grey:
            image = image.convert("L").convert(image.mode)
        return image


@dataclass(frozen=True)
class Erase:
    """Sets a random rectangle of a normalized image to 0, the mean colour (arXiv:1708.04896).

    probability: that an image loses one; area: of the image's, smallest and largest; aspect: widest height / width
    """

    probability: float
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: float = 10 / 3

    def __call__(self, pixels: Tensor, rng: Stream) -> None:
        """Changes `pixels` [C, H, W] in place."""
        chance, area, aspect, top, left = rng.uniform(0.0, 1.0, 5).tolist()
        if chance >= self.probability:
            return
        height, width = pixels.shape[1:]
        target = height * width * (self.area[0] + (self.area[1] - self.area[0]) * area)
        ratio = math.exp((2.0 * aspect - 1.0) * math.log(self.aspect))
        h = min(height, max(1, round(math.sqrt(target * ratio))))
        w = min(width, max(1, round(math.sqrt(target / ratio))))
        y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
        pixels[:, y : y + h, x : x + w] = 0.0


def generator(seed: int, epoch: int, index: int, *repeat: int) -> Stream:
    """The random numbers of one image in one epoch: the same whatever the worker, the batch or an
    interruption. repeat: which of several times in that epoch, where it is seen so often."""
    return Stream("augment", seed, epoch, index, *repeat)
