"""The classes of a picture's pixels, in colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

NAMED = 20  # classes up to which a figure has a legend


def colours(count: int) -> np.ndarray:
    """A colour for each of `count` classes, uint8 [count, 3]: the one of PASCAL VOC's palette, by the class's bits."""
    found = np.zeros((count, 3), np.uint8)
    for place in range(8):
        bits = np.arange(count) >> (3 * place)
        for channel in range(3):
            found[:, channel] |= (((bits >> channel) & 1) << (7 - place)).astype(np.uint8)
    return found


def painted(mask: Any) -> np.ndarray:
    """The colours of a mask's classes, uint8 [H, W, 3]; white where there is none (255)."""
    values = np.asarray(mask)
    palette = colours(256)
    palette[255] = 255
    return np.asarray(palette[values])


def legend(class_names: Sequence[str]) -> list[tuple[str, Any]]:
    """Names and colours of the classes; none where they are too many to be told apart."""
    if len(class_names) > NAMED:
        return []
    return list(zip(class_names, colours(len(class_names)), strict=True))
