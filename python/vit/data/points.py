"""Key points by their names: how far people's marks of them spread, and which changes place with which in a mirror."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .read import DataError
from .targets import KeyPoints

#: COCO's deviations of people's marks, as shares of the root of the person's area (its key-point evaluation).
SIGMAS = {
    "nose": 0.026, "eye": 0.025, "ear": 0.035, "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062, "hip": 0.107,
    "knee": 0.087, "ankle": 0.089,
}  # fmt: skip
OTHER = 0.067  # the mean of COCO's 17, for points of other names

#: The area of a person as a share of that of its box, where only the box is known: the mean of COCO's.
OF_BOX = 0.53


def key_points(
    points: np.ndarray,
    areas: np.ndarray,
    boxes: np.ndarray,
    names: Sequence[str],
    pairs: Sequence[tuple[int, int]] | None = None,
) -> KeyPoints:
    """Points [n, K, 3] of images with what is in them: its area [n], the width and height of its box [n, 2].

    pairs: numbers of points that change place in a mirror image; None: those whose names differ in left and right
    """
    spreads = np.array([2 * SIGMAS.get(_plain(name), OTHER) for name in names])
    sizes = np.stack([np.sqrt(areas), boxes.max(axis=1)], axis=1)
    return KeyPoints(points.astype(np.float64), sizes.astype(np.float64), spreads, mirrored(names, pairs))


def mirrored(names: Sequence[str], pairs: Sequence[tuple[int, int]] | None = None) -> np.ndarray:
    """Which point takes the place of each in a mirror image, int64 [K]. DataError for pairs that are none."""
    found = list(range(len(names)))
    if pairs is None:
        places = {name: place for place, name in enumerate(names)}
        pairs = [
            (place, places[other])
            for name, place in places.items()
            if (other := name.replace("left", "right")) != name and other in places
        ]
    for pair in pairs:
        if len(set(pair)) != 2 or not all(0 <= place < len(names) for place in pair):
            raise DataError(f"vit: flip pair {pair} must name two of the {len(names)} key points by number")
        first, second = pair
        if found[first] != first or found[second] != second:
            raise DataError(f"vit: the flip pairs have {names[first]} or {names[second]} twice")
        found[first], found[second] = second, first
    return np.array(found, np.int64)


def _plain(name: str) -> str:
    """left_eye -> eye."""
    return name.lower().removeprefix("left_").removeprefix("right_")
