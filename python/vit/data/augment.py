"""Training-time changes to images. Each takes a PIL image and a random generator and returns a PIL image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

from PIL import Image
from torch import Tensor

from ..support.random import Stream

VOID = 255  # the value of a mask where there is no class


class Augment(Protocol):
    """A random change of one image; `resizes` says that it also brings the image to the model's size. With `mask` and
    the same random numbers the mask of the image is moved as it is, without blending its values."""

    resizes: ClassVar[bool]

    def __call__(self, image: Image.Image, rng: Stream, mask: bool = False) -> Image.Image: ...


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

    def __call__(self, image: Image.Image, rng: Stream, mask: bool = False) -> Image.Image:
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            self.draw(image.size, rng),
            Image.Resampling.NEAREST if mask else Image.Resampling.BILINEAR,
            fillcolor=VOID if mask else self.fill,
        )

    def draw(self, size: tuple[int, int], rng: Stream) -> tuple[float, ...]:
        """a, b, c, d, e, f of a random change of an image of (width, height): what stands at (x, y) comes from
        (a x + b y + c, d x + e y + f)."""
        angle, shear, scale, right, down = rng.uniform(-1.0, 1.0, 5).tolist()
        angle, shear = math.radians(self.rotate * angle), math.tan(math.radians(self.shear * shear))
        scale = 1.0 / (1.0 + self.scale * scale)
        width, height = size
        # PIL asks, for every pixel of the result, where it comes from: p = A (q - centre) + centre + shift.
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        a, b, d, e = cos, sin + shear * cos, -sin, cos - shear * sin
        x, y = width / 2, height / 2
        c = x - a * x - b * y + self.shift * right * width
        f = y - d * x - e * y + self.shift * down * height
        # Sines and cosines differ in the last bit from one C library to another.
        return tuple(round(value, 12) for value in (a, b, c, d, e, f))


@dataclass(frozen=True)
class Elastic:
    """An affine change, and a bend: the knots of a grid of `cells` x `cells` move, and the image between them goes
    along bilinearly, as a hand draws a stroke a little longer or rounder (Simard 2003 moves every pixel, and smooths).

    affine: what it begins with; bend: how far a knot moves at most, as a fraction of the image's size, drawn uniformly
        in both directions
    """

    resizes: ClassVar[bool] = False

    affine: Affine = Affine(rotate=12.0, shear=12.0, scale=0.15, shift=0.08)
    bend: float = 0.05
    cells: int = 4

    def __call__(self, image: Image.Image, rng: Stream, mask: bool = False) -> Image.Image:
        width, height = image.size
        a, b, c, d, e, f = self.affine.draw(image.size, rng)
        knots = self.cells + 1
        moves = rng.uniform(-self.bend, self.bend, (knots, knots, 2)).tolist()
        across = [width * i // self.cells for i in range(knots)]
        down = [height * i // self.cells for i in range(knots)]
        source = [
            [
                (a * x + b * y + c + width * dx, d * x + e * y + f + height * dy)
                for x, (dx, dy) in zip(across, row, strict=True)
            ]
            for y, row in zip(down, moves, strict=True)
        ]
        cells = [
            (
                (across[i], down[j], across[i + 1], down[j + 1]),
                (*source[j][i], *source[j + 1][i], *source[j + 1][i + 1], *source[j][i + 1]),
            )
            for j in range(self.cells)
            for i in range(self.cells)
            if across[i] < across[i + 1]
            and down[j] < down[j + 1]  # an image may have fewer pixels than there are cells
        ]
        return image.transform(
            image.size,
            Image.Transform.MESH,
            cells,
            Image.Resampling.NEAREST if mask else Image.Resampling.BILINEAR,
            fillcolor=VOID if mask else self.affine.fill,
        )


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

    def __call__(self, image: Image.Image, rng: Stream, mask: bool = False) -> Image.Image:
        area, aspect, left, top, mirror = rng.uniform(0.0, 1.0, 5).tolist()
        width, height = image.size
        target = width * height * (self.area + (1.0 - self.area) * area)
        ratio = math.exp((2.0 * aspect - 1.0) * math.log(self.aspect))
        w = min(width, max(1, round(math.sqrt(target * ratio))))
        h = min(height, max(1, round(math.sqrt(target / ratio))))
        x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
        box = (x, y, min(width, x + w), min(height, y + h))
        kind = Image.Resampling.NEAREST if mask else Image.Resampling.BICUBIC
        image = image.resize(self.size[::-1], kind, box=box)
        if self.flip and mirror < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
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


def generator(seed: int, epoch: int, index: int) -> Stream:
    """The random numbers of one image in one epoch: the same whatever the worker, the batch or an
    interruption."""
    return Stream("augment", seed, epoch, index)
