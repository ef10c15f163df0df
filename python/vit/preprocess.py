"""The evaluation transform: a PIL image -> the tensor a model was trained to see.

Upright, resize, centre crop, scale to [0, 1], normalise, with PIL and torch only. Of an opaque image without an
orientation the values are, bit for bit, those of timm's evaluation transform (which needs torchvision); timm leaves a
phone's picture lying on its side and shows what transparent pixels hide.
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

from .support import affine, torch_resize
from .support.images import flat, is_deep, upright
from .support.records import Record, RecordError
from .support.resample import resized_window

CROP_MODES = ("center", "squash", "border")

#: Who resizes, and in which order: Pillow (timm); torchvision on whole numbers, scale and statistics in one step, or on
#: numbers already scaled to [0, 1] (transformers, since its version 5 and for DINOv3).
RESIZERS = ("pillow", "tensor", "scaled")
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}

FLOAT32_MAX = torch.finfo(torch.float32).max

#: The largest number of channels, patches and pixels of a side that a record may say; each has memory of its own.
MOST = 1 << 20

#: Pixels of an enlarged image that are computed although only its centre is kept: 64 MiB.
WHOLE = 1 << 24


@dataclass(frozen=True)
class Preprocess:
    """Resizes the shorter side to floor(img_size / crop_pct), crops the centre, returns (x / 255 - mean) / std.

    img_size: one side or (height, width). mean, std: one number per channel, or one for all. in_chans 1 makes
    the image grey, 3 RGB. Called with a PIL image it returns float32 [in_chans, height, width]. Before, the image is
    turned as its EXIF orientation says, and white is put behind what is transparent.

    crop_mode "squash" resizes both sides to floor(img_size / crop_pct) instead, whatever the aspect ratio, as
    transformers does for ViT and timm for some weights; "border" makes the longer side that long and puts the mean
    colour around the rest.

    max_num_patches: images keep their aspect ratio and get the largest size whose patches, of patch_size, are at most
    that many, each side a multiple of patch_size (NaFlex): float32 [in_chans, h, w]; img_size and the crop are unused.

    resizer: "pillow", or "tensor" and "scaled": the numbers of transformers' image processors on tensors, which crop at
    the lower of two middles.

    Raises ValueError for settings that do not fit together, TypeError for anything but a PIL image.
    """

    img_size: tuple[int, int]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    in_chans: int = 3
    crop_mode: str = "center"
    max_num_patches: int | None = None
    patch_size: int = 16
    resizer: str = "pillow"

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
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"vit: preprocess: crop_mode {self.crop_mode!r} is not one of {', '.join(CROP_MODES)}")
        if self.resizer not in RESIZERS:
            raise ValueError(f"vit: preprocess: resizer {self.resizer!r} is not one of {', '.join(RESIZERS)}")
        if self.resizer != "pillow" and self.interpolation not in torch_resize.MODES:
            raise ValueError(
                f"vit: preprocess: resizer {self.resizer!r} has the interpolations {', '.join(torch_resize.MODES)}, "
                f"got {self.interpolation!r}"
            )
        for name, value in (("max_num_patches", self.max_num_patches), ("patch_size", self.patch_size)):
            if value is not None and value < 1:
                raise ValueError(f"vit: preprocess: {name} must be positive, got {value}")
        if not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"vit: preprocess: crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if min(self.img_size) < 1:
            raise ValueError(f"vit: preprocess: img_size must be positive, got {self.img_size}")
        if not all(std > 0.0 for std in self.std):
            raise ValueError(f"vit: preprocess: std must be positive, got {self.std}")
        for mean, std in zip(self.mean, self.std, strict=True):
            # Of levels up to 255, with room for each step in float32; of NaN no comparison holds.
            if not (abs(mean) + 1.0) * 256.0 / min(std, 1.0) < FLOAT32_MAX or not std < FLOAT32_MAX:
                raise ValueError(
                    f"vit: preprocess: mean {self.mean} and std {self.std} must be finite, "
                    "and so must (x - mean) / std in float32"
                )

    def __call__(self, image: Image.Image) -> Tensor:
        image = self.convert(image)
        return self.normalize(self.resize(image)) if self.resizer == "pillow" else self._on_tensors(image)

    def convert(self, image: Image.Image) -> Image.Image:
        """The image upright, opaque (on white) and with the model's number of channels: grey for 1, RGB for 3."""
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"vit: preprocess takes a PIL image, got {type(image).__name__}; use Image.open(path) or "
                "Image.fromarray(array) (uint8, [H, W] or [H, W, 3])"
            )
        if self.in_chans not in (1, 3):
            raise ValueError(
                f"vit: preprocess: a PIL image cannot be made into {self.in_chans} channels; "
                "build the tensor yourself and use model.preprocess.mean and .std"
            )
        if not (image.width and image.height):
            raise ValueError(
                f"vit: preprocess: the image is {image.width} x {image.height} pixels, so there is nothing"
            )
        if is_deep(image):
            raise ValueError(
                f"vit: preprocess: the image has mode {image.mode!r}, more than 8 bits per pixel, and converting "
                "would clip it; scale it to 0 .. 255 first"
            )
        return flat(upright(image), "L" if self.in_chans == 1 else "RGB")

    def resize(self, image: Image.Image) -> Image.Image:
        """Resizes keeping the aspect ratio, then cuts out the central img_size; too small a side is padded with 0.

        The memory is in proportion to the image and the result, also where the resized image would be far larger.
        """
        height, width = self.img_size
        size = self._resized(image.size)
        if self.max_num_patches is not None:
            return image.resize(size, INTERPOLATIONS[self.interpolation])
        left, top = _centre(size[0], width), _centre(size[1], height)
        window = (left, top, left + width, top + height)
        resample = INTERPOLATIONS[self.interpolation]
        if min(left, top) >= 0 and size[0] * size[1] > max(image.width * image.height, WHOLE):
            return resized_window(image, size, window, resample)
        if self.crop_mode == "border":
            return self._on_border(image.resize(size, resample), left, top)
        return image.resize(size, resample).crop(window)  # PIL fills what lies outside with zeros

    def _on_border(self, image: Image.Image, left: int, top: int) -> Image.Image:
        """The centre of an image, on the mean colour where it is smaller than img_size."""
        colour = tuple(round(255 * mean) for mean in self.mean)
        canvas = Image.new(image.mode, self.img_size[::-1], colour if len(colour) > 1 else colour[0])
        canvas.paste(image, (-left, -top))
        return canvas

    def _on_tensors(self, image: Image.Image) -> Tensor:
        """An opaque image of 0 .. 255 -> float32 [C, H, W], resized and normalised as transformers does."""
        pixels = torch.from_numpy(np.array(image).reshape(image.height, image.width, -1)).permute(2, 0, 1).contiguous()
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        if self.resizer == "scaled":
            pixels = pixels * (1 / 255)
        else:
            mean, std = mean * (1.0 / (1 / 255)), std * (1.0 / (1 / 255))
        width, height = self._resized(image.size)
        pixels = torch_resize.resize(pixels, (height, width), self.interpolation)
        if self.max_num_patches is None:
            pixels = _cut(pixels, self.img_size)
        return (pixels.float() - mean) / std

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
        left_out = {"max_num_patches": None, "resizer": "pillow"}  # what earlier versions did not know
        values = {key: value for key, value in asdict(self).items() if key not in left_out or value != left_out[key]}
        if self.max_num_patches is None:
            del values["patch_size"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of to_dict; ValueError names unknown keys, values of a wrong kind and a missing img_size."""
        found = arguments(values, "preprocess")
        if "img_size" not in found:
            raise RecordError("vit: preprocess lacks img_size")
        return cls(**found)

    def place(self, size: tuple[int, int]) -> tuple[affine.Map, tuple[int, int]]:
        """Where each place of the result comes from in an upright image of that `size` (width, height), and the width
        and height of the result."""
        width, height = self._resized(size)
        across, down = size[0] / width, size[1] / height
        if self.max_num_patches is not None:
            return affine.window(0.0, 0.0, across, down), (width, height)
        shown = self.img_size[::-1]
        pairs = zip((width, height), shown, strict=True)
        if self.resizer == "pillow":
            left, top = (_centre(length, window) for length, window in pairs)
        else:  # the lower of two middles, as `_cut` takes it
            left, top = (have // 2 if (have := length - window) >= 0 else -(-have // 2) for length, window in pairs)
        return affine.window(left * across, top * down, across, down), shown

    def _resized(self, image: tuple[int, int]) -> tuple[int, int]:
        """(width, height) after the resize, rounded as the two tools do that made the published figures."""
        if self.max_num_patches is not None:
            return naflex_size(image, self.patch_size, self.max_num_patches)
        height, width = (math.floor(side / self.crop_pct) for side in self.img_size)
        if self.crop_mode == "squash":
            return width, height
        if self.crop_mode == "border":
            ratio = max(image[1] / height, image[0] / width)
            return max(round(image[0] / ratio), 1), max(round(image[1] / ratio), 1)
        if height == width:
            short = min(image)
            # The shorter side becomes exactly `height`; the longer is truncated.
            w, h = (height if side == short else int(height * side / short) for side in image)
            return w, h
        ratio = min(image[1] / height, image[0] / width)
        return round(image[0] / ratio), round(image[1] / ratio)

    def _per_channel(self, name: str, values: Any) -> tuple[float, ...]:
        values = tuple(float(v) for v in (values if isinstance(values, (tuple, list)) else (values,)))
        if len(values) == 1:
            return values * self.in_chans
        if len(values) != self.in_chans:
            raise ValueError(f"vit: preprocess: {name} has {len(values)} values for {self.in_chans} channel(s)")
        return values


def arguments(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values of a record as arguments of Preprocess; ValueError names source and key of what it cannot take."""
    known = {f.name for f in fields(Preprocess)}
    if unknown := sorted(set(map(str, values)) - known):
        raise RecordError(f"vit: {source}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    record = Record({key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}, source)
    found: dict[str, Any] = {}
    for key, value in record.values.items():
        if key in ("in_chans", "patch_size"):
            found[key] = record.integer(key, low=1, high=MOST)
        elif key == "max_num_patches":
            found[key] = None if value is None else record.integer(key, low=1, high=MOST)
        elif key == "crop_pct":
            found[key] = record.number(key)
        elif key in ("interpolation", "crop_mode", "resizer"):
            found[key] = record.text(key)
        elif not isinstance(value, list):
            found[key] = record.integer(key, low=1, high=MOST) if key == "img_size" else (record.number(key),)
        elif key == "img_size" and (len(value) != 2 or not all(type(side) is int and side <= MOST for side in value)):
            record.refuse(key, "a whole number or [height, width]")
        else:
            found[key] = tuple(value) if key == "img_size" else record.numbers(key)
            if not value:
                record.refuse(key, "one number for each channel")
    return found


def naflex_size(size: tuple[int, int], patch: int, most: int) -> tuple[int, int]:
    """(width, height) -> the largest size of the same shape whose sides, rounded up to multiples of `patch`, hold at
    most `most` patches: by bisection of the scale up to 1e-5, as SigLIP 2 (arXiv:2502.14786), timm and transformers."""

    def sides(scale: float) -> tuple[int, int]:
        width, height = (max(math.ceil(side * scale / patch), 1) for side in size)
        return width, height

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        if math.prod(sides(middle)) <= most:
            low = middle
        else:
            high = middle
    width, height = sides(low)
    return width * patch, height * patch


def _cut(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The centre of [C, h, w], with zeros around it where it is smaller; of two middles the lower one."""
    missing = [max(want - have, 0) for want, have in zip(size, pixels.shape[1:], strict=True)]
    if any(missing):
        rows, columns = missing
        sides = (columns // 2, (columns + 1) // 2, rows // 2, (rows + 1) // 2)
        pixels = torch.nn.functional.pad(pixels, sides)
    top, left = ((have - want) // 2 for want, have in zip(size, pixels.shape[1:], strict=True))
    return pixels[:, top : top + size[0], left : left + size[1]]


def _centre(length: int, window: int) -> int:
    """Where a centred window begins, rounded half to even as for the published accuracies; negative if it is longer."""
    return -((window - length) // 2) if window > length else round((length - window) / 2)
