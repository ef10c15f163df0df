"""A window of an enlarged image without the rest of it: the bits of `image.resize(size, filter).crop(window)`.

A picture of 60000 x 1 pixels whose shorter side becomes 224 is 13 million pixels wide, of which 224 are kept. Pillow's
`box` argument would start elsewhere in the picture, in float32, and round differently; so this follows Pillow's
arithmetic (its src/libImaging/Resample.c and Geometry.c) for the columns and rows that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

Resampling = Image.Resampling

#: Pillow's weights of 8-bit images are whole numbers of 2^-22.
_BITS = 22


def resized_window(
    image: Image.Image, size: tuple[int, int], window: tuple[int, int, int, int], resample: Image.Resampling
) -> Image.Image:
    """The part `window` (left, top, right, bottom) of an image of mode L or RGB enlarged to `size` (width, height)."""
    left, top, right, bottom = window
    taps = _nearest if resample is Resampling.NEAREST else _weights
    columns, across = taps(image.width, size[0], left, right, resample)
    rows, down = taps(image.height, size[1], top, bottom, resample)
    x, y = int(columns.min()), int(rows.min())
    part = image.crop((x, y, int(columns.max()) + 1, int(rows.max()) + 1))
    pixels = np.asarray(part).reshape(part.height, part.width, -1)
    pixels = _pass(pixels, columns - x, across)
    pixels = np.ascontiguousarray(_pass(pixels.swapaxes(0, 1), rows - y, down).swapaxes(0, 1))
    return Image.fromarray(pixels[:, :, 0] if image.mode == "L" else pixels)


def _pass(pixels: np.ndarray, taps: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """One direction: [lines, in, channels] -> [lines, out, channels]."""
    if weights is None:
        return pixels[:, taps[:, 0]]
    total = np.full((pixels.shape[0], len(taps), pixels.shape[2]), 1 << (_BITS - 1), dtype=np.int32)
    for tap, weight in zip(taps.T, weights.T, strict=True):
        total += pixels[:, tap] * weight[:, None]
    return np.clip(total >> _BITS, 0, 255).astype(np.uint8)


def _weights(
    source: int, target: int, first: int, last: int, resample: Image.Resampling
) -> tuple[np.ndarray, np.ndarray]:
    """For the places first..last of `target`: which of the `source` places count [places, taps], and how much."""
    reach, curve = _FILTERS[resample]
    scale = float(np.float32(source)) / target
    spread = max(scale, 1.0)
    support = reach * spread
    count = math.ceil(support) * 2 + 1
    taps = np.zeros((last - first, count), dtype=np.int64)
    weights = np.zeros((last - first, count), dtype=np.int32)
    for line, place in enumerate(range(first, last)):
        centre = (place + 0.5) * scale
        begin, end = max(0, int(centre - support + 0.5)), min(source, int(centre + support + 0.5))
        values = [curve((i - centre + 0.5) * (1.0 / spread)) for i in range(begin, end)]
        total = 0.0
        for value in values:  # not sum(): from Python 3.12 on it compensates the rounding
            total += value
        for i, value in enumerate(values):
            share = value / total if total else value
            weights[line, i] = int(share * (1 << _BITS) + (-0.5 if share < 0 else 0.5))
        taps[line] = begin
        taps[line, : end - begin] += np.arange(end - begin)
    return taps, weights


def _nearest(source: int, target: int, first: int, last: int, resample: Image.Resampling) -> tuple[np.ndarray, None]:
    """As _weights, of the one nearest place: Pillow adds the step up from the first place on."""
    step = float(np.float32(source)) / target
    position, place = 0.5 * step, 0
    while place < first:  # in pieces: the sum is of up to 2^31 terms
        terms = np.full(min(first - place, 1 << 20) + 1, step)
        terms[0] = position
        position = float(np.add.accumulate(terms)[-1])
        place += len(terms) - 1
    terms = np.full(last - first, step)
    terms[0] = position
    return np.add.accumulate(terms).astype(np.int64).clip(0, source - 1)[:, None], None


def _bilinear(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _hamming(x: float) -> float:
    x = abs(x)
    if x >= 1.0:
        return 0.0
    return _sinc(x) * (0.54 + 0.46 * math.cos(x * math.pi)) if x else 1.0


def _bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


def _sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


_FILTERS: dict[Image.Resampling, tuple[float, Callable[[float], float]]] = {
    Resampling.BOX: (0.5, _box),
    Resampling.BILINEAR: (1.0, _bilinear),
    Resampling.HAMMING: (1.0, _hamming),
    Resampling.BICUBIC: (2.0, _bicubic),
    Resampling.LANCZOS: (3.0, _lanczos),
}
