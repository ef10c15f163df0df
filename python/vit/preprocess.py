"""The evaluation transform: a PIL image -> the tensor a model was trained to see.

Resize, centre crop, scale to [0, 1], normalise, with PIL and torch only and, bit for bit, the values of
timm's evaluation transform (which needs torchvision).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@dataclass(frozen=True)
class Preprocess:
    """Resizes the shorter side to floor(img_size / crop_pct), crops the centre, returns (x / 255 - mean) / std.

    img_size: one side or (height, width). mean, std: one number per channel, or one for all. in_chans 1 makes
    the image grey, 3 RGB. Called with a PIL image it returns float32 [in_chans, height, width].

    Raises ValueError for settings that do not fit together, TypeError for anything but a PIL image.
    """

    img_size: tuple[int, int]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    in_chans: int = 3

    def __post_init__(self) -> None:
        size = self.img_size
        # The dataclass is frozen: these three settle the forms that arguments and JSON may take.
        object.__setattr__(self, "img_size", (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])))
        object.__setattr__(self, "mean", self._per_channel("mean", self.mean))
        object.__setattr__(self, "std", self._per_channel("std", self.std))
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"vit: preprocess: interpolation {self.interpolation!r} is not one of {', '.join(INTERPOLATIONS)}"
            )
        if not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"vit: preprocess: crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if min(self.img_size) < 1:
            raise ValueError(f"vit: preprocess: img_size must be positive, got {self.img_size}")
        if min(self.std) <= 0.0:
            raise ValueError(f"vit: preprocess: std must be positive, got {self.std}")

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalize(self.resize(self.convert(image)))

    def convert(self, image: Image.Image) -> Image.Image:
        """The image with the model's number of channels: grey for 1, RGB for 3."""
        if not isinstance(image, Image.Image):
            raise TypeError(f"vit: preprocess takes a PIL image, got {type(image).__name__}; use Image.open(path)")
        if self.in_chans not in (1, 3):
            raise ValueError(
                f"vit: preprocess: a PIL image cannot be made into {self.in_chans} channels; "
                "build the tensor yourself and use model.preprocess.mean and .std"
            )
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            raise ValueError(
                f"vit: preprocess: the image has mode {image.mode!r}, more than 8 bits per pixel, and converting "
                "would clip it; scale it to 0 .. 255 first"
            )
        return image.convert("L" if self.in_chans == 1 else "RGB")

    def resize(self, image: Image.Image) -> Image.Image:
        """Resizes keeping the aspect ratio, then cuts out the central img_size; too small a side is padded with 0."""
        height, width = self.img_size
        image = image.resize(self._resized(image), INTERPOLATIONS[self.interpolation])
        left, top = _centre(image.width, width), _centre(image.height, height)
        return image.crop((left, top, left + width, top + height))  # PIL fills what lies outside with zeros

    def normalize(self, image: Image.Image) -> Tensor:
        """An image of 0 .. 255 -> float32 [C, H, W]."""
        # In NumPy: on small images ten torch calls would take longer than all the rest of the transform.
        pixels = np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, -1)
        values = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
        values /= np.float32(255)
        values -= np.asarray(self.mean, dtype=np.float32)[:, None, None]
        values /= np.asarray(self.std, dtype=np.float32)[:, None, None]
        return torch.from_numpy(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of to_dict; ValueError names unknown keys."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"vit: preprocess: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) after the resize, rounded as the two tools do that made the published figures."""
        height, width = (math.floor(side / self.crop_pct) for side in self.img_size)
        if height == width:
            short = min(image.size)
            # The shorter side becomes exactly `height`; the longer is truncated.
            w, h = (height if side == short else int(height * side / short) for side in image.size)
            return w, h
        ratio = min(image.height / height, image.width / width)
        return round(image.width / ratio), round(image.height / ratio)

    def _per_channel(self, name: str, values: Any) -> tuple[float, ...]:
        values = tuple(float(v) for v in (values if isinstance(values, (tuple, list)) else (values,)))
        if len(values) == 1:
            return values * self.in_chans
        if len(values) != self.in_chans:
            raise ValueError(f"vit: preprocess: {name} has {len(values)} values for {self.in_chans} channel(s)")
        return values


def _centre(length: int, window: int) -> int:
    """Where a centred window begins, rounded half to even as for the published accuracies; negative if it is longer."""
    return -((window - length) // 2) if window > length else round((length - window) / 2)
