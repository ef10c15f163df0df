"""The config.json and preprocessor_config.json beside transformers' weights: each key used, or refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..support.records import Record
from .layouts import model_types, of_model_type
from .transformers_config import classes_of, finish, sides

FEATURES = ("Model", "Backbone", "ForPreTraining", "ForMaskedImageModeling", "ModelWithProjection")
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def about(record: Record) -> dict[str, Any]:
    """What transformers' config.json says of a ViT, as arguments of Checkpoint."""
    kind = record.text("model_type")
    layout = of_model_type(kind)
    if layout is None or layout.configure is None:
        record.refuse("model_type", f"one of {', '.join(model_types())}")
    arch = layout.configure(record)
    names = _labels(record)
    classes = record.integer("num_labels", len(names) if names else None, 0)
    classifies = any("ForImageClassification" in name for name in classes_of(record))
    if classifies:
        arch["num_classes"] = 2 if classes is None else classes  # transformers' default
    elif classes_of(record):
        names = None
        if all(name.endswith(FEATURES) for name in classes_of(record)):
            arch.setdefault("num_classes", 0)
    finish(record)
    return {"arch": arch, "class_names": names, "base": layout.base}


def _labels(record: Record) -> tuple[str, ...] | None:
    labels = record.record("id2label", None) if record.raw("id2label", None) is not None else None
    if labels is None:
        return None
    values = labels.values
    if sorted(values, key=str) != sorted(map(str, range(len(values)))):
        record.refuse("id2label", f"names for the classes 0 to {len(values) - 1}")
    return tuple(labels.text(str(i)) for i in range(len(values))) or None


def preprocess(path: Path) -> dict[str, Any] | None:
    """What preprocessor_config.json says, as arguments of Preprocess; None where there is no such file.

    transformers resizes to exactly `size` where that is height and width, (x * rescale_factor - mean) / std afterwards.
    """
    if not path.exists():
        return None
    record = Record.read(path)
    kind = record.text("image_processor_type", record.text("feature_extractor_type", "ViTImageProcessor"))
    for key in ("processor_class", "_processor_class", "feature_extractor_type", "data_format", "return_tensors"):
        record.raw(key, None)
    for key in ("input_data_format", "device", "_valid_processor_keys", "valid_processor_keys", "auto_map"):
        record.raw(key, None)
    record.raw("do_convert_rgb", None)  # the model's channels decide
    for key in ("do_pad", "do_flip_channel_order", "do_reduce_labels", "do_normalize_labels"):
        if record.raw(key, None) not in (None, False):
            record.refuse(key, "false")
    if not record.boolean("do_resize", True):
        record.refuse("do_resize", "true, for a model takes images of one size; pass the weights file itself")
    size = _resized(record, kind.startswith("ViT"))
    cropped = record.raw("do_center_crop", None)
    if cropped not in (None, False, True):
        record.refuse("do_center_crop", "true or false")
    crop = _crop(record) if cropped else None
    for key in ("crop_size", "default_to_square"):
        record.raw(key, None)
    found: dict[str, Any] = {"interpolation": RESAMPLE[record.choice("resample", RESAMPLE, 2)]}
    found |= _window(record, size, crop)
    found |= _statistics(record)
    record.finish()
    return found


def _resized(record: Record, square: bool) -> tuple[int, ...]:
    """(height, width) that images are resized to, or (shorter side,)."""
    value = record.raw("size", {"height": 224, "width": 224})
    if isinstance(value, dict):
        size = record.record("size", Record({"height": 224, "width": 224}, record.source))
        if "shortest_edge" in size:
            side = size.integer("shortest_edge", low=1, high=1 << 16)
            size.finish()
            return (side,)
        height, width = size.integer("height", low=1, high=1 << 16), size.integer("width", low=1, high=1 << 16)
        size.finish()
        return height, width
    if isinstance(value, int) and not (square or record.raw("default_to_square", False)):
        return (record.integer("size", low=1, high=1 << 16),)
    return sides(record, "size", 224)


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


def _statistics(record: Record) -> dict[str, Any]:
    """Mean and standard deviation of pixels / 255: any rescale factor is part of them."""
    factor = record.number("rescale_factor", 1 / 255, low=1e-12, high=1e6)
    scale = 255 * factor if record.boolean("do_rescale", True) else 255.0
    mean, std = _per_channel(record, "image_mean"), _per_channel(record, "image_std")
    if not record.boolean("do_normalize", True):
        mean, std = (0.0,), (1.0,)
    if min(std, default=0.0) <= 0.0:
        record.refuse("image_std", "numbers above 0")
    if abs(scale - 1.0) < 1e-9:
        return {"mean": mean, "std": std}
    return {"mean": tuple(m / scale for m in mean), "std": tuple(s / scale for s in std)}


def _per_channel(record: Record, key: str) -> tuple[float, ...]:
    value = record.raw(key, None)
    if value is None:
        return (0.5,) * 3
    return (record.number(key),) if isinstance(value, (int, float)) else record.numbers(key)
