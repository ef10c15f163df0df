"""The config.json beside timm's published weights: each key used, known to mean nothing here, or refused by name.

As timm reads it: top level over pretrained_cfg, model_args over both.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from ..model.options import POOLS
from ..preprocess import CROP_MODES, INTERPOLATIONS
from ..support.records import Record
from .records import arguments, class_of, known_arguments
from .records import transform as transform_of

log = logging.getLogger("vit")

#: Where the weights come from, texts about them, and sizes that only other models or other evaluations use.
_IRRELEVANT = (
    *("url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag", "custom_load", "license", "description"),
    *(
        "origin_url",
        "paper_name",
        "paper_ids",
        "notes",
        "test_input_size",
        "min_input_size",
        "test_crop_pct",
        "pool_size",
    ),
    *(
        "test_pool_size",
        "label_descriptions",
        "paper_title",
        "num_features",
        "architecture",
        "model_type",
        "architectures",
    ),
    *("transformers_version", "torch_dtype", "dtype", "do_pooling", "initializer_range", "hf_hub_revision"),
)
#: timm's arguments that no model here has, and the values that mean it is as if they were not there.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "strict_img_size": (True,),
    "use_naflex": (None, False),
    "qkv_fused": (True,),
    "output_fmt": (None,),
    "device": (None,),
    "dtype": (None,),
    "block_fn": (None,),
    "attn_layer": (None,),
    "embed_layer": (None,),
    # of NaFlexVit
    "embed_proj_type": ("linear",),
    "pos_embed_use_grid_sample": (False,),
    "enable_patch_interpolator": (False,),
    "patchify_channels_last": (True,),
    "use_key_only_attn_mask": (False, True),  # of patches that fill up, of which there are none here
    "input_norm_layer": (None,),
    "rope_type": ("", "none"),
    "attn_type": ("standard",),
    "attn_gated": (False,),
    "attn_only_layer_scale": (False,),
    "num_kv_heads": (None,),
    "swiglu_mlp": (False,),
    "attn_pool_num_heads": (None,),
    "attn_pool_mlp_ratio": (None,),
}
#: Names of classes, as a config may spell them beside the names that options have.
_SPELLINGS = {"swiglupacked": "swiglu_packed", "swish": "silu", "layernorm2d": "layernorm", "learn": "learned"}


def about(record: Record) -> dict[str, Any]:
    """What timm's config.json says, as arguments of Checkpoint."""
    name = record.text("architecture", None)
    if name is not None and not name.partition(".")[0]:
        record.refuse("architecture", "the name of a model")
    cfg = record.record("pretrained_cfg", None)
    flat = cfg is None  # older files have all of it in one object
    cfg = record if cfg is None else cfg
    arch = _defaults(record, cfg, class_of(None if name is None else name.partition(".")[0]))
    args = record.record("model_args", None)
    if args is not None:
        arch |= _arguments(args, None if name is None else name.partition(".")[0])
        _compare_sizes(cfg, arch)
    if record.raw("architectures", None) == ["TimmWrapperModel"]:  # of transformers: without a head, whatever cfg says
        arch["num_classes"] = 0
    names = _labels(record, cfg)
    transform = _transform(cfg, arch.get("in_chans", 3))
    own = record.record("vit", None)
    if own is not None:  # of a config that vit wrote
        if (values := own.record("arch", None)) is not None:
            arch |= arguments(values, known_arguments(None if name is None else name.partition(".")[0]))
        transform = (transform_of(own, "preprocess") or transform) if own.raw("preprocess", None) else transform
        own.finish()
    for one in (record, cfg):
        for key in _IRRELEVANT:
            one.raw(key, None)
    if not flat:
        cfg.finish()
    record.finish()
    return {
        "name": None
        if name is None
        else name.partition(".")[0],  # a tag after the dot tells weights, not models, apart
        "arch": arch,
        "preprocess": transform or None,
        "class_names": names,
    }


def _defaults(record: Record, cfg: Record, kind: Any) -> dict[str, Any]:
    """Arguments that timm takes from the configuration of the weights."""
    arch: dict[str, Any] = {}
    for one in (cfg, record):
        classes = one.integer("num_classes", None, low=-1) if one.raw("num_classes", None) is not None else None
        if classes is not None and classes >= 0:
            arch["num_classes"] = classes
        if one.raw("global_pool", None) is not None:
            arch["global_pool"] = one.choice("global_pool", POOLS)
    fixed = cfg.raw("fixed_input_size", None)
    if fixed not in (None, False, True):
        cfg.refuse("fixed_input_size", "true or false")
    size = cfg.raw("input_size", None)
    if size is not None:
        if not isinstance(size, list) or len(size) != 3 or not all(type(one) is int and one > 0 for one in size):
            cfg.refuse("input_size", "[channels, height, width]")
        arch["in_chans"] = size[0]
        if fixed:
            arch["img_size"] = (size[1], size[2])
    last = kind.CLASSIFIER
    for key, own in (("first_conv", kind.FIRST_CONV), ("classifier", last if isinstance(last, str) else list(last))):
        if cfg.raw(key, None) not in (None, own, [], "head" if key == "classifier" else None):
            cfg.refuse(key, f"{own!r}, as in timm's ViT")
    if cfg.raw("label_offset", None) not in (None, 0):
        cfg.refuse("label_offset", "0: this reads all rows of the head")
    return arch


def _compare_sizes(cfg: Record, arch: dict[str, Any]) -> None:
    """timm leaves input_size as it was when a model is trained at another size: its transform then does not fit it."""
    size, made = cfg.raw("input_size", None), arch.get("img_size")
    if size is None or made is None:
        return
    made = [made, made] if isinstance(made, int) else list(made)
    if made != size[1:]:
        log.warning(
            "%s: input_size says images of %d x %d, model_args of %d x %d, as they are made here",
            *(cfg.source, size[1], size[2], made[0], made[1]),
        )


def _arguments(args: Record, name: str | None) -> dict[str, Any]:
    """model_args -> arguments of the named model's class."""
    kind, known = class_of(name), known_arguments(name)
    rest: dict[str, Any] = {}
    for key, value in args.values.items():
        if key in _ABSENT and key not in known:
            if not any(value == one and type(value) is type(one) for one in _ABSENT[key]):
                args.refuse(key, f"left out or {' or '.join(map(str, _ABSENT[key]))}: this model does not have it")
            continue
        try:
            rest |= kind.spelled({key: _spelled(value) if key.endswith("_layer") or key == "pos_embed" else value})
        except (ValueError, TypeError):
            args.refuse(key, "a value of timm's")
    return arguments(Record(rest, args.source), known)


def _spelled(value: Any) -> Any:
    """A class by its name alone (torch.nn.SiLU: SiLU), and as the options spell it."""
    if not isinstance(value, str):
        return value
    last = value.rpartition(".")[2]
    return _SPELLINGS.get(last.lower(), last)


def _labels(record: Record, cfg: Record) -> tuple[str, ...] | None:
    """Class names: a list, or an object of class number and name."""
    for one, key in ((record, "label_names"), (cfg, "label_names"), (record, "labels"), (cfg, "labels")):
        if (names := one.raw(key, None)) is None:
            continue
        if isinstance(names, dict):
            table = one.record(key)
            if set(names) != set(map(str, range(len(names)))):
                continue  # gaps: not a name for every class
            return tuple(table.text(str(i)) for i in range(len(names)))
        return one.texts(key) or None
    return None


def _transform(cfg: Record, channels: int) -> dict[str, Any]:
    """The evaluation transform in a pretrained_cfg, as arguments of Preprocess."""
    found: dict[str, Any] = {}
    for key in ("mean", "std"):
        if cfg.raw(key, None) is not None:
            found[key] = cfg.numbers(key)
            if len(found[key]) not in (1, 3, channels):  # of RGB images beside a model of other channels: their mean
                cfg.refuse(key, f"one number for each of {channels} channels")
    if min(found.get("std", (1.0,)), default=0.0) <= 0.0:
        cfg.refuse("std", "numbers above 0")
    if cfg.raw("interpolation", None) is not None:
        found["interpolation"] = cfg.choice("interpolation", INTERPOLATIONS)
    if cfg.raw("crop_pct", None) is not None:
        found["crop_pct"] = cfg.number("crop_pct", low=math.ulp(0.0), high=1.0)
    if cfg.raw("crop_mode", None) is not None:
        found["crop_mode"] = cfg.choice("crop_mode", CROP_MODES)
    if cfg.raw("crop_border_pixels", None) not in (None, 0):
        cfg.refuse("crop_border_pixels", "0")
    return found
