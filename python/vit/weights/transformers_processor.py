"""The preprocessor_config.json beside transformers' weights, as arguments of Preprocess: each key used, or refused by
name. What a file leaves out is what its class of processors has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.zoo import CLIP, HALF, IMAGENET
from ..support import torch_resize
from ..support.records import Record
from .transformers_config import ignore, sides

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class Processor:
    """What a class of image processors does where its file does not say. square: what a single size means."""

    size: dict[str, int]
    crop: bool = False
    resample: int = 2
    statistics: tuple[tuple[float, ...], ...] = HALF
    square: bool = True
    resizer: str = "tensor"


_SQUARE, _SHORT = {"height": 224, "width": 224}, {"shortest_edge": 224}
PROCESSORS = {
    "ViT": Processor(_SQUARE),
    "DeiT": Processor({"height": 256, "width": 256}, crop=True, resample=3),
    "CLIP": Processor(_SHORT, crop=True, resample=3, statistics=CLIP, square=False),
    "Bit": Processor(_SHORT, crop=True, resample=3, statistics=CLIP, square=False),
    "Siglip": Processor(_SQUARE, resample=3, square=False),
    "Siglip2": Processor(_SQUARE),
    "DINOv3ViT": Processor(_SQUARE, statistics=IMAGENET, resizer="scaled"),
}
_SUFFIXES = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")


def preprocess(path: Path) -> dict[str, Any] | None:
    """What preprocessor_config.json says, as arguments of Preprocess; None where there is no such file."""
    return preprocess_of(Record.read(path)) if path.exists() else None


def preprocess_of(record: Record) -> dict[str, Any]:
    """What an image processor's record says, as arguments of Preprocess.

    transformers resizes to exactly `size` where that is height and width, (x * rescale_factor - mean) / std afterwards.
    """
    name = record.text("image_processor_type", record.text("feature_extractor_type", "ViTImageProcessor"))
    known = {kind + suffix: (kind, suffix) for kind in PROCESSORS for suffix in _SUFFIXES}
    if name not in known:
        record.refuse("image_processor_type", f"one of {', '.join(f'{kind}ImageProcessor' for kind in PROCESSORS)}")
    kind, suffix = known[name]
    own = PROCESSORS[kind]
    ignore(record, "processor_class", "_processor_class", "feature_extractor_type", "data_format", "return_tensors")
    ignore(record, "input_data_format", "device", "_valid_processor_keys", "valid_processor_keys", "auto_map")
    ignore(record, "do_convert_rgb", "disable_grouping", "image_seq_length")  # the model's channels decide
    for key in ("do_pad", "do_flip_channel_order", "do_reduce_labels", "do_normalize_labels"):
        if record.raw(key, None) not in (None, False):
            record.refuse(key, "false")
    if not record.boolean("do_resize", True):
        record.refuse("do_resize", "true, for a model takes images of one size; pass the weights file itself")
    interpolation = RESAMPLE[record.choice("resample", RESAMPLE, own.resample)]
    found: dict[str, Any] = {"interpolation": interpolation} | _statistics(record, own.statistics)
    if suffix != "ImageProcessorPil" and interpolation in torch_resize.MODES:
        found["resizer"] = own.resizer
    if kind == "Siglip2":
        found["max_num_patches"] = record.integer("max_num_patches", 256, 1)
        found["patch_size"] = record.integer("patch_size", 16, 1)
        ignore(record, "size", "do_center_crop", "crop_size", "default_to_square")
    else:
        found |= _geometry(record, own)
    record.finish()
    return found


def _geometry(record: Record, own: Processor) -> dict[str, Any]:
    size = _resized(record, own)
    cropped = record.raw("do_center_crop", own.crop)
    if cropped not in (None, False, True):
        record.refuse("do_center_crop", "true or false")
    crop = _crop(record) if cropped else None
    ignore(record, "crop_size", "default_to_square")
    return _window(record, size, crop)


def _resized(record: Record, own: Processor) -> tuple[int, ...]:
    """(height, width) that images are resized to, or (shorter side,)."""
    value = record.raw("size", None)
    if isinstance(value, int) and not (own.square or record.raw("default_to_square", False)):
        return (record.integer("size", low=1, high=1 << 16),)
    if value is not None and not isinstance(value, dict):
        return sides(record, "size", 224)
    size = record.record("size") if value is not None else Record(own.size, record.source)
    if "shortest_edge" in size:
        side = size.integer("shortest_edge", low=1, high=1 << 16)
        size.finish()
        return (side,)
    height, width = size.integer("height", low=1, high=1 << 16), size.integer("width", low=1, high=1 << 16)
    size.finish()
    return height, width


def _crop(record: Record) -> tuple[int, int]:
    value = record.raw("crop_size", {"height": 224, "width": 224})
    if not isinstance(value, dict):
        return sides(record, "crop_size", 224)
    crop = record.record("crop_size", Record({"height": 224, "width": 224}, record.source))
    height, width = crop.integer("height", low=1, high=1 << 16), crop.integer("width", low=1, high=1 << 16)
    crop.finish()
    return height, width


def _window(record: Record, size: tuple[int, ...], crop: tuple[int, int] | None) -> dict[str, Any]:
    """Size, crop fraction and mode of a resize followed by a crop."""
    if len(size) == 1 and crop is None:
        record.refuse("size", "height and width, or a shortest_edge with do_center_crop: other images differ in size")
    crop = crop or (size[0], size[1])
    if len(size) == 1 and crop[0] != crop[1]:
        record.refuse("crop_size", "a square where size is a shortest_edge")
    fraction = _fraction(crop, size if len(size) == 2 else size * 2)
    if fraction is None:
        record.refuse("crop_size", "the same part of the size in height and width, and no larger than it")
    mode = "squash" if len(size) == 2 else "center"
    return {"img_size": crop, "crop_pct": fraction, "crop_mode": mode}


def _fraction(crop: tuple[int, int], size: tuple[int, ...]) -> float | None:
    """crop / size such that floor(crop / fraction) is size on both sides."""
    first = crop[0] / size[0]
    for fraction in (first, math.nextafter(first, 0.0), crop[1] / size[1], math.nextafter(crop[1] / size[1], 0.0)):
        if 0.0 < fraction <= 1.0 and all(math.floor(c / fraction) == s for c, s in zip(crop, size, strict=True)):
            return fraction
    return None


def _statistics(record: Record, own: tuple[tuple[float, ...], ...]) -> dict[str, Any]:
    """Mean and standard deviation of pixels / 255: any rescale factor is part of them."""
    factor = record.number("rescale_factor", 1 / 255, low=1e-12, high=1e6)
    scale = 255 * factor if record.boolean("do_rescale", True) else 255.0
    mean, std = _per_channel(record, "image_mean", own[0]), _per_channel(record, "image_std", own[1])
    if not record.boolean("do_normalize", True):
        mean, std = (0.0,), (1.0,)
    if min(std, default=0.0) <= 0.0:
        record.refuse("image_std", "numbers above 0")
    if abs(scale - 1.0) < 1e-9:
        return {"mean": mean, "std": std}
    return {"mean": tuple(m / scale for m in mean), "std": tuple(s / scale for s in std)}


def _per_channel(record: Record, key: str, own: tuple[float, ...]) -> tuple[float, ...]:
    value = record.raw(key, None)
    if value is None:
        return own
    return (record.number(key),) if isinstance(value, (int, float)) else record.numbers(key)
