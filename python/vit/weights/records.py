"""Arguments of a model in records: model.json of a run, as `vit train` writes it, and others: every key by its kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import preprocess
from ..model.configs import CONFIGS, model_class
from ..model.init import SCHEMES
from ..model.options import ACTIVATIONS, MLPS, NORMS, POOLS, POSITIONS, RESIZES
from ..support.records import Record, RecordError
from .transformers_config import sides

_COUNTS = ("in_chans", "embed_dim", "depth", "num_heads", "attn_pool_num_heads", "max_num_patches")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "global_pool": POOLS,
    "pos_embed": POSITIONS,
    "patch_embed": ("conv", "linear"),
    "act_layer": ACTIVATIONS,
    "norm_layer": NORMS,
    "embed_norm_layer": (None, *NORMS),
    "mlp_layer": MLPS,
    "pos_resize": (None, *RESIZES),
    "pos_embed_interp_mode": ("bicubic", "bilinear"),
    "weight_init": SCHEMES,
}
_SIDES = ("img_size", "patch_size", "pos_embed_grid_size")
_SIDES_OR_NONE = ("patch_stride", "ref_feat_shape")
_SWITCHES_OR_NONE = ("fc_norm", "use_post_transformer_norm", "use_fc_norm")


def run(record: Record) -> dict[str, Any]:
    """What model.json says, as arguments of Checkpoint."""
    arch = record.record("arch", None)
    names = record.texts("class_names", None) if record.raw("class_names", None) is not None else None
    preprocessing = transform(record, "preprocess")
    if preprocessing is not None and "img_size" not in preprocessing:  # a run always has it: the file was cut
        record.refuse("preprocess", "the transform of a run, with img_size")
    return {
        "name": record.text("name", None),
        "arch": {} if arch is None else arguments(arch, known_arguments(record.raw("name", None))),
        "preprocess": preprocessing,
        "class_names": names or None,
    }


def known_arguments(name: str | None) -> Mapping[str, Any]:
    """The arguments of the class of a named model -> their defaults; of VisionTransformer where it is not known."""
    return class_of(name).ARGUMENTS


def class_of(name: str | None) -> Any:
    """The class of a named model; VisionTransformer where it is not known."""
    return model_class(CONFIGS[name].kind if name is not None and name in CONFIGS else "vit")


def arguments(record: Record, known: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model in a record; those that are not known are refused."""
    found: dict[str, Any] = {}
    for key in record.values:
        name = "dynamic_img_pad" if key == "dynamic_pad" else key
        if name in known:
            found[name] = _argument(record, key, name, known[name])
    record.finish()
    return found


def _argument(record: Record, key: str, name: str, default: Any) -> Any:
    """One value, by the kind that its argument has."""
    if name in _SIDES or (name in _SIDES_OR_NONE and record.raw(key) is not None):
        return sides(record, key, 0)
    if name in _CHOICES:
        return record.choice(key, _CHOICES[name])
    if record.raw(key) is None and default is None:
        return None
    if isinstance(default, tuple):
        values = record.numbers(key)
        if not all(value == int(value) and value >= 1 for value in values):
            record.refuse(key, "a list of whole numbers from 1")
        return tuple(map(int, values))
    if isinstance(default, bool) or name in _SWITCHES_OR_NONE:
        return record.boolean(key)
    if name in _COUNTS:
        return record.integer(key, low=1)
    if isinstance(default, int):
        return record.integer(key, low=0)
    if isinstance(default, str):
        return record.text(key)
    return record.number(key, low=0.0, high=1.0 if name.endswith("_rate") or name.endswith("norm_eps") else 1e9)


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
