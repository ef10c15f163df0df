"""Affine maps of the plane as Pillow writes them: (a, b, c, d, e, f) takes (x, y) to (a x + b y + c, d x + e y + f).

Coordinates are those of a picture's area: (0, 0) is its upper left corner, the middle of the first pixel (0.5, 0.5). A
map of a picture says, for each place of the result, where in the picture it comes from.
"""

from __future__ import annotations

import math

import numpy as np

Map = tuple[float, float, float, float, float, float]

IDENTITY: Map = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def window(left: float, top: float, across: float, down: float) -> Map:
    """Of a part resized: its corner, and how many pixels of the picture one of the result is wide and high."""
    return (across, 0.0, left, 0.0, down, top)


def after(outer: Map, inner: Map) -> Map:
    """p -> outer(inner(p)): of a picture that was changed by `outer` first and then by `inner`."""
    a, b, c, d, e, f = outer
    p, q, r, s, t, u = inner
    return (a * p + b * s, a * q + b * t, a * r + b * u + c, d * p + e * s, d * q + e * t, d * r + e * u + f)


def area(of: Map) -> float:
    """The signed area of the picture that comes to one pixel of the result; below 0 where it is a mirror image."""
    a, b, _, d, e, _ = of
    return a * e - b * d


def scale(of: Map) -> float:
    """How many pixels of the picture one of the result is wide, on the mean of all directions."""
    return math.sqrt(abs(area(of)))


def found(of: Map, points: np.ndarray) -> np.ndarray:
    """Where in the picture the `points` [n, 2] of the result come from, float64."""
    a, b, c, d, e, f = of
    x, y = points[:, 0], points[:, 1]
    return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)


def moved(of: Map, points: np.ndarray) -> np.ndarray:
    """Where the `points` [n, 2] of the picture are in the result, float64: the inverse of `found`."""
    a, b, c, d, e, f = of
    x, y = points[:, 0] - c, points[:, 1] - f
    return np.stack([e * x - b * y, a * y - d * x], axis=1) / area(of)
