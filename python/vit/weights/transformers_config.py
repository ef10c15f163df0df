"""The config.json and preprocessor_config.json beside transformers' weights: each key used, or refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..support.records import Record

#: transformers' names of sizes -> ours, and what a config that leaves them out means.
_SIZES = {
    "num_channels": ("in_chans", 3),
    "hidden_size": ("embed_dim", 768),
    "num_hidden_layers": ("depth", 12),
    "num_attention_heads": ("num_heads", 12),
}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
#: Of training, of other tasks, or about the file: nothing that logits depend on.
_IRRELEVANT = (
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "name_or_path"),
    *("_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "auto_map"),
    *("initializer_range", "encoder_stride", "pooler_act", "pooler_output_size", "label2id", "problem_type"),
    *("finetuning_task", "return_dict", "output_hidden_states", "output_attentions", "use_cache", "torchscript"),
    *("gradient_checkpointing", "is_encoder_decoder", "tie_word_embeddings", "_num_labels", "task_specific_params"),
)
#: Keys every config of transformers may have from its base class, and the one value that means nothing for a ViT.
_INERT: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "layer_types": (None,),
}
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def about(record: Record) -> dict[str, Any]:
    """What transformers' config.json says of a ViT, as arguments of Checkpoint."""
    record.choice("model_type", ("vit",))
    arch: dict[str, Any] = {ours: record.integer(key, default, 1) for key, (ours, default) in _SIZES.items()}
    arch["img_size"] = sides(record, "image_size", 224)
    arch["patch_size"] = sides(record, "patch_size", 16)
    hidden = record.integer("intermediate_size", 3072, 1)
    arch["mlp_ratio"] = _ratio(hidden, arch["embed_dim"])
    arch["norm_eps"] = record.number("layer_norm_eps", 1e-12, low=0.0, high=1.0)
    arch["qkv_bias"] = record.boolean("qkv_bias", True)
    arch["act_layer"] = ACTIVATIONS[record.choice("hidden_act", ACTIVATIONS, "gelu")]
    rates = {"proj_drop_rate": "hidden_dropout_prob", "attn_drop_rate": "attention_probs_dropout_prob"}
    for ours, theirs in rates.items():
        if rate := record.number(theirs, 0.0, 0.0, 1.0):
            arch[ours] = rate
    names = _labels(record)
    classes = record.integer("num_labels", len(names) if names else None, 0)
    if "ViTForImageClassification" in (record.raw("architectures", None) or []):
        arch["num_classes"] = 2 if classes is None else classes  # transformers' default
    elif "ViTModel" in (record.raw("architectures", None) or []):
        arch["num_classes"], names = 0, None
    for key in _IRRELEVANT:
        record.raw(key, None)
    for key, allowed in _INERT.items():
        if record.raw(key, allowed[0]) not in allowed:
            record.refuse(key, f"left out or {allowed[0]}")
    record.finish()
    return {"arch": arch, "class_names": names}


def sides(record: Record, key: str, default: int) -> tuple[int, int]:
    """One side or [height, width]."""
    value = record.raw(key, default)
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value, value]
    if not isinstance(value, list) or len(value) != 2 or not all(type(side) is int and side > 0 for side in value):
        record.refuse(key, "a positive whole number or [height, width]")
    return value[0], value[1]


def _ratio(hidden: int, width: int) -> float:
    """A ratio with int(width * ratio) == hidden, which plain division misses for some sizes."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _labels(record: Record) -> tuple[str, ...] | None:
    labels = record.record("id2label", None)
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
