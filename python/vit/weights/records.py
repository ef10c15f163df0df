"""model.json of a run, as `vit train` writes it: every key by its kind."""

from __future__ import annotations

from typing import Any

from .. import preprocess
from ..model.init import SCHEMES
from ..model.specs import APPROXIMATE
from ..model.vision_transformer import POOLS, POSITIONS
from ..support.records import Record, RecordError
from .transformers_config import sides

_COUNTS = ("in_chans", "embed_dim", "depth", "num_heads")
_RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
_CHOICES = {
    "global_pool": POOLS,
    "pos_embed": POSITIONS,
    "patch_embed": ("conv", "linear"),
    "act_layer": APPROXIMATE,
    "weight_init": SCHEMES,
}


def run(record: Record) -> dict[str, Any]:
    """What model.json says, as arguments of Checkpoint."""
    arch = record.record("arch", None)
    names = record.texts("class_names", None) if record.raw("class_names", None) is not None else None
    preprocessing = transform(record, "preprocess")
    if preprocessing is not None and "img_size" not in preprocessing:  # a run always has it: the file was cut
        record.refuse("preprocess", "the transform of a run, with img_size")
    return {
        "name": record.text("name", None),
        "arch": {} if arch is None else arguments(arch),
        "preprocess": preprocessing,
        "class_names": names or None,
    }


def arguments(record: Record) -> dict[str, Any]:
    """The arguments of VisionTransformer in a record; those that are not known are refused."""
    found: dict[str, Any] = {}
    for key in record.values:
        if key in ("img_size", "patch_size"):
            found[key] = sides(record, key, 0)
        elif key in _COUNTS:
            found[key] = record.integer(key, low=1)
        elif key == "num_classes":
            found[key] = record.integer(key, low=0)
        elif key in _RATES:
            found[key] = record.number(key, low=0.0, high=1.0)
        elif key == "mlp_ratio":
            found[key] = record.number(key, low=0.0, high=1e6)
        elif key == "norm_eps":
            found[key] = record.number(key, low=0.0, high=1.0)
        elif key in ("qkv_bias", "class_token", "dynamic_pad"):
            found[key] = record.boolean(key)
        elif key == "fc_norm":
            found[key] = record.boolean(key, None) if record.raw(key) is not None else None
        elif key in _CHOICES:
            found[key] = record.choice(key, _CHOICES[key])
    record.finish()
    return found


def transform(record: Record, key: str) -> dict[str, Any] | None:
    """The values below `key` as arguments of Preprocess."""
    found = record.record(key, None) if record.raw(key, None) is not None else None
    if found is None:
        return None
    values = preprocess.arguments(found.values, found.source)
    try:
        preprocess.Preprocess(**{"img_size": 1, **values})
    except ValueError as error:
        raise RecordError(f"vit: {found.source}: {str(error).removeprefix('vit: preprocess: ')}") from error
    return values
