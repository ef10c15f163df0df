"""A model in timm's layout: model.safetensors and config.json with its architecture, arguments and preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..model.configs import CONFIGS, get_config
from ..model.options import ALIASES
from ..support.files import replacing, to_json
from ..support.tensors import write_tensors

#: Arguments of ours alone: timm reads a config without them.
OWN = (
    *(
        "norm_eps",
        "embed_norm_eps",
        "drop_edge",
        "pos_resize",
        "patch_embed",
        "patch_stride",
        "representation_size",
        "decoder",
    ),
    "max_num_patches",
)
#: Where timm's Eva and NaFlexVit have names of their own.
NAFLEX_NAMES = {"scale_attn_norm": "scale_attn_inner_norm"}
EVA_NAMES = {o: theirs for theirs, o in ALIASES.items() if theirs not in ("dynamic_pad", *NAFLEX_NAMES.values())}


def save(model: Any, folder: str | Path) -> dict[str, Any]:
    """Writes model.safetensors and config.json, which timm reads and vit.create(weights=folder) reads whole; what
    config.json says. OSError when it cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = config(model)
    with replacing(folder / "config.json") as temporary:  # of weights that cannot be written the old config stays
        temporary.write_text(to_json(record, indent=2) + "\n", encoding="utf-8")
        write_tensors(folder / "model.safetensors", model.state_dict())
    return record


def config(model: Any) -> dict[str, Any]:
    """The config.json of a model: `model_args` are timm's arguments where they differ from the named model's, and what
    only vit knows stands under `vit`."""
    arch = _changed(model)
    own = {key: arch.pop(key) for key in OWN if key in arch}
    preprocess = model.preprocess.to_dict()
    pretrained = dict(model.pretrained_cfg) | {"input_size": list(model.pretrained_cfg["input_size"])}
    del pretrained["architecture"]
    record: dict[str, Any] = {
        "architecture": model.name.partition(".")[0],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": _as_timm_names(model, arch),
        "pretrained_cfg": pretrained,
        "vit": {"arch": own, "preprocess": preprocess},
    }
    if model.class_names:
        record["label_names"] = list(model.class_names)
    return record


def _changed(model: Any) -> dict[str, Any]:
    """The options of a model that are not what its name alone stands for."""
    kind, name = type(model), model.name.partition(".")[0]
    options = model.options
    named = dict(get_config(name).arch) if name in CONFIGS else {}
    usual = type(options)(**kind.spelled(named))
    found = {}
    for key in kind.ARGUMENTS:
        if key == "weight_init":  # of training from the start
            continue
        value = _current(model, key)
        if _plain(value) != _plain(getattr(usual, key)):
            found[key] = list(value) if key == "decoder" else _plain(value)
    if tuple(model.patch_embed.img_size) != _pair(usual.img_size):
        found["img_size"] = list(model.patch_embed.img_size)
    else:
        found.pop("img_size", None)
    return found


def _current(model: Any, key: str) -> Any:
    """An option as it is now: the head may have been exchanged since the model was made."""
    return getattr(model, key) if key in ("num_classes", "global_pool") else getattr(model.options, key)


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return value[0] if len(set(value)) == 1 else list(value)
    return value


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _as_timm_names(model: Any, arch: dict[str, Any]) -> dict[str, Any]:
    """Our arguments under timm's names and in its spelling."""
    eva, naflex = ("rope_type" in type(model).ARGUMENTS, "pos_embed_grid_size" in type(model).ARGUMENTS)
    own = EVA_NAMES if eva else NAFLEX_NAMES if naflex else {}
    found: dict[str, Any] = {}
    for key, value in arch.items():
        name = own.get(key, key)
        if name == "use_abs_pos_emb":
            value = value == "learned"
        elif name == "pos_embed" and not naflex:
            value = {"learned": "learn", "none": ""}.get(value, value)
        found[name] = value
    if eva:  # of swiglu_mlp
        found.pop("mlp_layer", None)
        found.pop("act_layer", None)
    return found
