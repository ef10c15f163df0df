"""Drawn pictures for segmentation: squares, discs and triangles in any colour on a mottled ground, 32 x 32."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ...support.random import Stream
from ..format import Format
from ..samples import Samples, Source
from ..targets import Masks

CLASSES = ("ground", "square", "disc", "triangle")
COUNT, SIDE = 2400, 32


def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture uint8 [32, 32, 3] and mask uint8 [32, 32] of a number: one to three shapes, later ones before earlier.

    Colours say nothing of the class: what a pixel is can be told from the outline around it alone.
    """
    rng = Stream("shapes", index)
    ground, noise = rng.uniform(0.0, 255.0, 3), rng.uniform(-24.0, 24.0, (SIDE, SIDE, 3))
    picture, mask = np.clip(ground + noise, 0, 255), np.zeros((SIDE, SIDE), np.uint8)
    down, across = np.mgrid[0:SIDE, 0:SIDE]
    for _ in range(1 + int(rng.integers(0, 3, 1)[0])):
        kind = 1 + int(rng.integers(0, 3, 1)[0])
        radius, (y, x) = rng.uniform(5.0, 9.0, 1)[0], rng.uniform(7.0, SIDE - 7.0, 2)
        colour = (ground + rng.uniform(70.0, 186.0, 3)) % 256
        dy, dx = down - y, across - x
        inside = {
            1: (abs(dy) <= 0.85 * radius) & (abs(dx) <= 0.85 * radius),
            2: dy * dy + dx * dx <= radius * radius,
            3: (dy <= 0.8 * radius) & (abs(dx) <= 0.55 * (dy + radius)),
        }[kind]
        picture[inside], mask[inside] = np.clip(colour + noise[inside] / 2, 0, 255), kind
    return picture.astype(np.uint8), mask


@lru_cache(maxsize=1)
def shapes() -> Source:
    """All pictures as one "train" split."""
    pictures, masks = zip(*map(draw, range(COUNT)), strict=True)
    keys = [str(i) for i in range(COUNT)]
    samples = Samples(np.stack(pictures), np.zeros(COUNT, np.int64), keys, Masks(np.stack(masks)))
    return Source("shapes", "shapes", CLASSES, {"train": samples})


FORMAT = Format(
    about="shapes (drawn, for segmentation)",
    recognizes=lambda data: data == "shapes",
    open=lambda data, request: shapes(),
    recipe=lambda data: "shapes",
    rank=1,
    built_in=True,
)
