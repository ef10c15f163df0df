"""`vit.from_timm` and `vit.from_transformers`: a live model of another library as vit's, with the same weights.

The arguments of the model are read from it and go the way of a config.json; its own library makes a model from them,
without memory, and what is not the same there is refused by name.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import factory
from ..model import VisionTransformer
from ..model.configs import CONFIGS, model_class
from ..support.records import Record, RecordError
from ..weights import Report, WeightsError, infer, timm_config, transformers_processor, transformers_records
from ..weights.file import checkpoint_of
from ..weights.layout import Mapped
from ..weights.layouts import model_types, of_model_type
from .trees import check_same, check_untouched, one_place

_TIMM = {
    ("timm.models.vision_transformer", "VisionTransformer"): "vit",
    ("timm.models.deit", "VisionTransformerDistilled"): "deit",
    ("timm.models.eva", "Eva"): "eva",
}
#: What may be switched at any time, and is taken along.
_RUNTIME = ("fused_attn", "grad_checkpointing", "distilled_training", "weight_init_mode")


def from_timm(model: Any, backend: str = "auto") -> VisionTransformer:
    """vit's model with the weights of a live one of timm: VisionTransformer, VisionTransformerDistilled or Eva.

    Its parameters are the very same Parameter objects: training one trains the other. Sizes, options, preprocessing
    (`model.preprocess`), class names, modes, requires_grad, dtype and device are the live model's.
    `vit.weights.report` lists every parameter. backend: as of vit.create.

    Raises TypeError for another class, WeightsError naming what vit's model would not have: hooks, exchanged or
    parametrized modules, options of timm's that are not known here; BackendError when a named backend cannot run it.
    """
    kind = _kind(model, "from_timm")
    what = f"from_timm: the {type(model).__name__}"
    check_untouched(model, what)
    like = one_place(model, what)
    arguments = (_eva if kind == "eva" else _vit)(model)
    check_same(model, _twin(type(model), arguments), what, _RUNTIME)
    about = _about_timm(model, what)
    ours = model_class(kind)
    settings = ours.spelled({key: value for key, value in arguments.items() if key not in ("weight_init", "img_size")})
    settings["img_size"] = model.patch_embed.img_size
    if not settings["dynamic_img_pad"] and _has_rest(model.patch_embed):
        settings["drop_edge"] = True
    name = about["name"] or type(model).__name__
    try:
        # Without memory, and with any backend: the plan is made where the parameters are.
        made = ours(**settings, weight_init="skip", name=name, device="meta", dtype=like.dtype)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"vit: {what}: {str(error).removeprefix('vit: ')}") from error
    made.backend = backend
    _share(made, model)
    config = CONFIGS[name].preprocess if name in CONFIGS else {}
    made.preprocess = factory.preprocess_for({**config, **(about["preprocess"] or {})}, made)
    names = about["class_names"] or ()
    made.class_names = names if names and len(names) == made.num_classes else None
    return _take_modes(made, model)


def from_transformers(
    model: nn.Module,
    processor: Any = None,
    backend: str = "auto",
    img_size: int | tuple[int, int] | None = None,
) -> VisionTransformer:
    """vit's model with the weights of a live one of transformers: the classes that docs/weights.md lists.

    The configuration is `model.config`; every parameter whose values are the same in both layouts is the very same
    Parameter object. q, k and v, which vit keeps as one matrix, are copied, and so is what has another shape:
    `vit.weights.report` says so of each. Towers of texts and heads of pretraining are left out, as from a file.
    processor: the image processor, for `model.preprocess`; without it the one of the named model that is nearest.
    backend, img_size: as of vit.create.

    Raises TypeError for another class, WeightsError naming what vit's model would not have: hooks, exchanged or
    parametrized modules, values of the configuration that are not known here; BackendError as vit.create.
    """
    what = f"from_transformers: the {type(model).__name__}"
    kind, config = type(model), getattr(model, "config", None)
    layout = of_model_type(str(getattr(config, "model_type", "")))
    if not isinstance(model, nn.Module) or not kind.__module__.startswith("transformers.models.") or layout is None:
        raise TypeError(_wrong_class(model, "from_transformers", f"a ViT of transformers ({', '.join(model_types())})"))
    check_untouched(model, what)
    like = one_place(model, what)
    check_same(model, _transformers_twin(model), what, _SET)
    _check_ties(model, what)
    try:
        about = transformers_records.about(_config_of(model, what))
        if processor is not None:
            about["preprocess"] = transformers_processor.preprocess_of(
                _record(getattr(processor, "image_processor", processor).to_dict(), f"{what}'s processor")
            )
    except RecordError as error:
        raise WeightsError(str(error)) from error
    state = dict(model.state_dict(keep_vars=True))
    checkpoint = checkpoint_of(state, what, **about)
    made = factory.create(
        None, backend, checkpoint, img_size=img_size, dtype=like.dtype, device=like.device, training=True
    )
    _share_mapped(made, state, what)
    _take_modes(made, model, names=False)
    return made


# ---- timm ----


def _kind(model: Any, function: str) -> str:
    found = _TIMM.get((type(model).__module__, type(model).__name__))
    if found is None:
        raise TypeError(_wrong_class(model, function, f"timm's {', '.join(name for _, name in _TIMM)}"))
    return found


def _wrong_class(model: Any, function: str, wanted: str) -> str:
    kind = type(model)
    inner = next(
        (n for n in ("module", "_orig_mod", "timm_model") if isinstance(getattr(model, n, None), nn.Module)), None
    )
    hint = f"; pass what is in it: model.{inner}" if inner is not None else ""
    return f"vit: {function} takes {wanted}, got {kind.__module__}.{kind.__qualname__}{hint}"


def _rate(module: Any) -> float:
    return float(getattr(module, "p", 0.0))


def _norm(module: Any) -> Any:
    """The class of a norm as an argument of timm's models."""
    kind: Any = type(module)
    return functools.partial(kind, eps=module.eps)


def _common(model: Any) -> dict[str, Any]:
    """What both of timm's classes have, under the names of VisionTransformer."""
    found = infer.options(dict(model.state_dict()), eva=type(model).__name__ == "Eva")
    first, patches = model.blocks[0], model.patch_embed
    return {
        **found,
        "img_size": tuple(patches.img_size or (0, 0)),
        "patch_size": tuple(patches.patch_size),
        "in_chans": patches.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "num_heads": first.attn.num_heads,
        "no_embed_class": model.no_embed_class,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": patches.dynamic_img_pad,
        "drop_rate": _rate(model.head_drop),
        "pos_drop_rate": _rate(model.pos_drop),
        "patch_drop_rate": float(getattr(model.patch_drop, "prob", 0.0)),
        "proj_drop_rate": _rate(first.attn.proj_drop),
        "attn_drop_rate": _rate(first.attn.attn_drop),
        "drop_path_rate": float(getattr(model.blocks[-1].drop_path1, "drop_prob", 0.0)),
        "norm_layer": _norm(first.norm1),
    }


def _vit(model: Any) -> dict[str, Any]:
    """The arguments of a VisionTransformer, distilled or not."""
    first, last_norms = model.blocks[0], (model.norm, model.fc_norm)
    mlp: Any = type(first.mlp)
    found = _common(model) | {
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "reg_tokens": model.num_reg_tokens,
        "class_token": model.cls_token is not None,
        "pool_include_prefix": getattr(model, "pool_include_prefix", False),
        "final_norm": any(not isinstance(norm, nn.Identity) for norm in last_norms),
        "init_values": getattr(first.ls1, "init_values", None),
        "act_layer": type(first.mlp.act),
        "mlp_layer": functools.partial(mlp, gate_last=first.mlp.gate_last) if hasattr(first.mlp, "gate_last") else mlp,
        "fix_init": getattr(model, "fix_init", False),
        "weight_init": "skip",
    }
    if found["final_norm"]:
        found["fc_norm"] = not isinstance(model.fc_norm, nn.Identity)
    if not isinstance(norm := model.patch_embed.norm, nn.Identity):
        found["embed_norm_layer"] = _norm(norm)
        if norm.eps != first.norm1.eps:
            raise WeightsError(
                f"vit: from_timm: patch_embed.norm.eps is {norm.eps}, and that of the others {first.norm1.eps}"
            )
    return found


def _eva(model: Any) -> dict[str, Any]:
    """The arguments of an Eva."""
    first, rope = model.blocks[0], model.rope
    found = _common(model) | {
        "attn_type": "eva" if type(first.attn).__name__ == "EvaAttention" else "rope",
        "init_values": getattr(first, "init_values", None),
        "use_post_norm": type(first).__name__ == "EvaBlockPostNorm",
        "use_post_transformer_norm": not isinstance(model.norm, nn.Identity),
        "use_fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "qk_norm": not isinstance(first.attn.q_norm, nn.Identity),
        "use_rot_pos_emb": rope is not None,
        "head_init_scale": model.head_init_scale,
    }
    if type(first.mlp).__name__ == "SwiGLU" and not found.get("scale_mlp"):
        found["swiglu_align_to"] = 1  # what makes it a gate of its own; the width is that of the weights
    if (pool := model.attn_pool) is not None:
        width = pool.mlp.fc1.out_features / found["embed_dim"]
        found |= {"attn_pool_num_heads": pool.num_heads, "attn_pool_mlp_ratio": width}
    return found if rope is None else found | _rope(rope)


_ROPES = {"RotaryEmbeddingCat": "cat", "RotaryEmbeddingMixed": "mixed", "RotaryEmbeddingDinoV3": "dinov3"}


def _rope(rope: Any) -> dict[str, Any]:
    """The arguments of rotary positions."""
    kind = type(rope).__name__
    if kind not in _ROPES:
        raise WeightsError(f"vit: from_timm: rope is a {kind}; known are {', '.join(_ROPES)}")
    found = {
        "rope_type": _ROPES[kind],
        "rope_temperature": rope.temperature,
        "rope_grid_indexing": rope.grid_indexing,
        "rope_rotate_half": getattr(rope, "rotate_half", False),
        "rope_grid_offset": getattr(rope, "grid_offset", 0.0),
        "ref_feat_shape": getattr(rope, "ref_feat_shape", None),
    }
    for name in ("shift_coords", "jitter_coords", "rescale_coords"):
        found[f"rope_{name}"] = getattr(rope, name, None)
    return found


def _twin(kind: Any, arguments: Mapping[str, Any]) -> Any:
    """A model that timm makes of the arguments, as far as its version has them, without memory."""
    known: set[str] = set()
    for one in kind.__mro__:
        if "__init__" in vars(one):
            known |= set(inspect.signature(one.__init__).parameters)
    with torch.device("meta"):
        return kind(**{key: value for key, value in arguments.items() if key in known})


def _has_rest(patches: Any) -> bool:
    """Whether pixels beyond the last whole patch are not read."""
    return any(side % size for side, size in zip(patches.img_size, patches.patch_size, strict=True))


def _about_timm(model: Any, what: str) -> dict[str, Any]:
    """What the configuration of the weights says: name, preprocessing, class names."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    cfg = cfg if isinstance(cfg, Mapping) else cfg.to_dict()
    try:
        # The model itself says how many classes it has, and how it pools.
        skipped = ("num_classes", "global_pool", "input_size", "state_dict", "label_names", "first_conv", "classifier")
        values = {key: value for key, value in cfg.items() if key not in skipped}
        record = _record(
            {"architecture": cfg.get("architecture"), "pretrained_cfg": values}, f"{what}'s pretrained_cfg"
        )
        about = timm_config.about(record)
    except RecordError as error:
        raise WeightsError(str(error)) from error
    names = cfg.get("label_names")
    return about | {"class_names": tuple(names) if isinstance(names, (list, tuple)) else None}


def _share(made: VisionTransformer, model: nn.Module) -> None:
    """The very parameters of a model of equal names."""
    theirs = dict(model.named_parameters(remove_duplicate=False))
    for name, own in made.named_parameters():
        if name in theirs:  # loading asks the parameter that is replaced
            own.requires_grad_(theirs[name].requires_grad)
    made.load_state_dict(model.state_dict(keep_vars=True), strict=True, assign=True)
    mapped = tuple(Mapped((name,), (name,), "as it is, shared") for name in made.state_dict())
    object.__setattr__(made, "load_report", Report(f"the live {type(model).__name__}", "timm", made.name, mapped))


def _take_modes(made: VisionTransformer, model: nn.Module, names: bool = True) -> VisionTransformer:
    """Training modes and switches: of every module where names are equal."""
    made.train(model.training)
    if not names:
        return made
    for name, module in made.named_modules():
        theirs = model.get_submodule(name)
        module.training = theirs.training
        for switch in ("fused_attn", "grad_checkpointing", "distilled_training"):
            if hasattr(theirs, switch) and hasattr(module, switch):
                setattr(module, switch, getattr(theirs, switch))
    return made


# ---- transformers ----

#: What is set when a model is loaded or trained, and no part of its arithmetic.
_SET = ("name_or_path", "gradient_checkpointing")


def _transformers_twin(model: Any) -> Any:
    """A model that transformers makes of the configuration, without memory."""
    kind: Any = type(model)
    known, more = inspect.signature(kind.__init__).parameters, {}
    if "add_pooling_layer" in known:
        more["add_pooling_layer"] = getattr(model, "pooler", None) is not None
    if "use_mask_token" in known:
        more["use_mask_token"] = getattr(model.embeddings, "mask_token", None) is not None
    with torch.device("meta"):
        return kind(copy.deepcopy(model.config), **more)


def _record(values: Any, source: str) -> Record:
    """A configuration as it would stand in a file."""
    return Record(json.loads(json.dumps(values, default=str)), source)


def _config_of(model: Any, what: str) -> Record:
    """The config.json that save_pretrained would write."""
    values = json.loads(model.config.to_json_string())
    return Record(values | {"architectures": [type(model).__name__]}, f"{what}'s config")


def _check_ties(model: nn.Module, what: str) -> None:
    """Refuses one parameter under two names, which two layouts would take for two."""
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (other := seen.setdefault(id(parameter), name)) != name:
            raise WeightsError(f"vit: {what}: {other} and {name} are one parameter; give each its own")


def _share_mapped(made: Any, state: Mapping[str, Any], what: str) -> None:
    """The very parameters wherever one of theirs is one of ours; requires_grad of all; the report says which."""
    report: Report = made.load_report
    prefix = _prefix(report, state)
    mapped = []
    times = Counter(target for one in report.mapped for target in one.targets)
    for one in report.mapped:
        names = [prefix + source if prefix + source in state else source for source in one.sources]
        sources = [state[name] for name in names if name in state]
        wanted = {source.requires_grad for source in sources if isinstance(source, nn.Parameter)}
        if len(wanted) > 1:
            raise WeightsError(
                f"vit: {what}: of {' and '.join(one.sources)}, which become {' and '.join(one.targets)}, some are "
                "frozen (requires_grad) and some are not"
            )
        shared = False
        for target in one.targets:
            holder, _, key = target.rpartition(".")
            module = made.get_submodule(holder)
            if (own := module._parameters.get(key)) is None:
                continue
            alone = len(sources) == len(one.targets) == times[target] == 1
            # Conversions that come after the renaming (the class token's position added to it) change values alone.
            shared = alone and sources[0].shape == own.shape and torch.equal(sources[0], own)
            if shared:
                module._parameters[key] = sources[0]
            elif wanted:
                own.requires_grad_(wanted == {True})
        mapped.append(Mapped(one.sources, one.targets, f"{one.how}, {'shared' if shared else 'a copy'}"))
    object.__setattr__(made, "load_report", Report(**{**vars(report), "mapped": tuple(mapped)}))


def _prefix(report: Report, state: Mapping[str, Any]) -> str:
    """What stands before the names of the report in those of the model."""
    first = next(source for one in report.mapped for source in one.sources)
    return next((name.removesuffix(first) for name in state if name.endswith(first)), "")
