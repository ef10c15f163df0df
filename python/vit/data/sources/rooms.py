"""Drawn scenes for depth: a floor up to a wall, and boxes of any colour that stand on it, 32 x 32.

How far away a box is can be told from where it stands: one closer to the lower border is nearer. Its size and colour
say nothing.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ...support.random import Stream
from ..format import Format
from ..samples import Samples, Source
from ..targets import Depths
from .depth_folders import CLASSES

COUNT, SIDE = 1200, 32
EYE, HORIZON = 1600.0, 11.0  # height of the camera in millimetres, and the row at which it looks


def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture uint8 [32, 32, 3] and depths uint16 [32, 32], in millimetres, of a number."""
    rng = Stream("rooms", index)
    wall = rng.uniform(4000.0, 9000.0, 1)[0]
    rows = np.arange(SIDE)[:, None] + 0.5
    # A camera of one focal length, looking ahead: the floor of row y is at EYE f / (y - HORIZON).
    floor = EYE * SIDE / np.maximum(rows - HORIZON, 1e-3)
    depths = np.broadcast_to(np.minimum(floor, wall), (SIDE, SIDE)).copy()
    colours, noise = rng.uniform(0.0, 255.0, (2, 3)), rng.uniform(-16.0, 16.0, (SIDE, SIDE, 3))
    picture = np.where((floor < wall)[..., None], colours[0], colours[1]) + noise
    near = EYE * SIDE / (SIDE - 1 - HORIZON)
    away = np.sort(rng.uniform(near, wall, 1 + int(rng.integers(0, 3, 1)[0])))[::-1]
    for distance in away:  # the nearest last: it hides the others
        (left, width, height), colour = rng.uniform(0.0, 1.0, 3), rng.uniform(0.0, 255.0, 3)
        bottom = round(HORIZON + EYE * SIDE / distance)
        wide, high = 4 + int(8 * width), 5 + int(12 * height)
        x = int(left * (SIDE - wide + 1))
        part = np.s_[max(0, bottom - high) : bottom, x : x + wide]
        depths[part], picture[part] = distance, colour + noise[part] / 2
    return np.clip(picture, 0, 255).astype(np.uint8), np.rint(depths).astype(np.uint16)


@lru_cache(maxsize=1)
def rooms() -> Source:
    """All pictures as one "train" split."""
    pictures, depths = zip(*map(draw, range(COUNT)), strict=True)
    keys = [str(i) for i in range(COUNT)]
    samples = Samples(np.stack(pictures), np.zeros(COUNT, np.int64), keys, Depths(np.stack(depths)))
    return Source("rooms", "rooms", CLASSES, {"train": samples})


FORMAT = Format(
    about="rooms (drawn, for depth)",
    recognizes=lambda data: data == "rooms",
    open=lambda data, request: rooms(),
    recipe=lambda data: "rooms",
    rank=1,
    built_in=True,
)
