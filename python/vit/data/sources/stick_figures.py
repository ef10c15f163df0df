"""Drawn figures for pose estimation: a head, a body and four limbs of any colour on a mottled ground, 48 x 48."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from ...support.random import Stream
from ..format import Format
from ..points import OF_BOX, key_points
from ..samples import Samples, Source

#: COCO's names, so that its sigmas hold. The figure faces the viewer: its left is on the right.
NAMES = ("nose", *(f"{side}_{joint}" for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
                   for side in ("left", "right")))  # fmt: skip
COUNT, SIDE = 1600, 48


def _joints(rng: Stream) -> np.ndarray:
    """Places of the points [13, 2] around the hips, one unit a pixel."""
    scale, lean = rng.uniform(0.62, 0.92, 1)[0], rng.uniform(-0.4, 0.4, 1)[0]
    turns = rng.uniform(-1.0, 1.0, 8)

    def away(start: np.ndarray, angle: float, length: float) -> np.ndarray:
        """So far from a place, in the direction that is `angle` from straight down, to the left of the figure."""
        return start + scale * length * np.array([math.sin(angle), math.cos(angle)])

    hips = np.zeros(2)
    neck = away(hips, math.pi + lean, 15.0)
    across = scale * np.array([math.cos(lean), -math.sin(lean)])
    found = {"nose": away(neck, math.pi + lean, 6.0)}
    for i, (side, sign) in enumerate((("left", 1.0), ("right", -1.0))):
        arm, fore, thigh, shin = turns[4 * i : 4 * i + 4].tolist()
        shoulder, hip = neck + sign * 6.0 * across, hips + sign * 3.5 * across
        elbow = away(shoulder, sign * (1.0 + 1.3 * arm) - lean, 8.0)
        knee = away(hip, sign * (0.35 + 0.45 * thigh) - lean / 2, 9.0)
        found |= {f"{side}_shoulder": shoulder, f"{side}_elbow": elbow, f"{side}_hip": hip, f"{side}_knee": knee}
        found[f"{side}_wrist"] = away(elbow, sign * (1.0 + 1.3 * arm + 1.1 * fore) - lean, 7.5)
        found[f"{side}_ankle"] = away(knee, sign * (0.2 + 0.45 * thigh + 0.4 * shin) - lean / 2, 9.0)
    return np.stack([found[name] for name in NAMES])


def draw(index: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Picture uint8 [48, 48, 3], points [13, 3] (x, y, 2) and width and height of the figure of a number."""
    rng = Stream("stick figures", index)
    places = _joints(rng)
    low, high = places.min(axis=0) - 3.0, places.max(axis=0) + 3.0
    room = np.maximum(SIDE - (high - low), 0.0)
    # Sines and cosines differ in the last bit from one C library to another.
    places = np.round(places - low + room * rng.uniform(0.0, 1.0, 2), 3).clip(1.0, SIDE - 1.0)
    ground, noise = rng.uniform(0.0, 255.0, 3), rng.uniform(-24.0, 24.0, (SIDE, SIDE, 3))
    colours = (ground + rng.uniform(70.0, 186.0, (3, 3))) % 256
    picture = ground + noise
    for colour, part in zip(colours, _parts(dict(zip(NAMES, places, strict=True))), strict=True):
        covered = np.clip(0.5 - _outside(*part), 0.0, 1.0)[..., None]
        picture += (colour + noise / 2 - picture) * covered
    points = np.concatenate([places, np.full((len(places), 1), 2.0)], axis=1)
    width, height = (places.max(axis=0) - places.min(axis=0) + 6.0).tolist()
    return np.clip(picture, 0, 255).astype(np.uint8), points, (width, height)


def _parts(of: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Trunk, head and limbs, in the order in which they are drawn: starts and ends [L, 2] and radii [L] of lines."""
    chest, waist = ((of[f"left_{part}"] + of[f"right_{part}"]) / 2 for part in ("shoulder", "hip"))
    trunk = [(of["left_shoulder"], of["right_shoulder"], 1.3), (of["left_hip"], of["right_hip"], 1.3)]
    trunk += [(chest, waist, 2.6), (chest, of["nose"], 1.0)]
    bones = (("shoulder", "elbow"), ("elbow", "wrist"), ("hip", "knee"), ("knee", "ankle"))
    limbs = [(of[f"{side}_{a}"], of[f"{side}_{b}"], 1.2) for a, b in bones for side in ("left", "right")]
    parts = (trunk, [(of["nose"], of["nose"], 3.4)], limbs)
    return [tuple(np.array(column) for column in zip(*lines, strict=True)) for lines in parts]  # type: ignore[misc]


def _outside(starts: np.ndarray, ends: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """How far each pixel's middle is outside of the nearest of some thick lines, [48, 48]; below 0 within."""
    middle = np.arange(SIDE) + 0.5
    (ax, ay), (dx, dy) = (ends - starts).T[..., None, None], (middle - starts.T[..., None])
    dx, dy = dx[:, None, :], dy[:, :, None]
    share = ((dx * ax + dy * ay) / np.maximum(ax * ax + ay * ay, 1e-9)).clip(0.0, 1.0)
    dx, dy = dx - share * ax, dy - share * ay
    away = np.sqrt(dx * dx + dy * dy) - radii[:, None, None]
    return np.asarray(away.min(axis=0))


@lru_cache(maxsize=1)
def stick_figures() -> Source:
    """All pictures as one "train" split."""
    pictures, points, boxes = zip(*map(draw, range(COUNT)), strict=True)
    sides = np.array(boxes)
    targets = key_points(np.stack(points), OF_BOX * sides.prod(axis=1), sides, NAMES)
    keys = [str(i) for i in range(COUNT)]
    samples = Samples(np.stack(pictures), np.zeros(COUNT, np.int64), keys, targets)
    return Source("stick_figures", "stick_figures", NAMES, {"train": samples})


FORMAT = Format(
    about="stick_figures (drawn, for pose estimation)",
    recognizes=lambda data: data == "stick_figures",
    open=lambda data, request: stick_figures(),
    recipe=lambda data: "stick_figures",
    rank=1,
    built_in=True,
)
