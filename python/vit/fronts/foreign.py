"""`vit.from_timm` and `vit.from_transformers`: a live model of another library as vit's, with the same weights.

The arguments of the model are read from it and go the way of a config.json; its own library makes a model from them,
without memory, and what is not the same there is refused by name.
"""

from __future__ import annotations

import copy
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
from ..weights import Report, WeightsError, timm_config, transformers_processor, transformers_records
from ..weights.file import checkpoint_of
from ..weights.layout import Mapped
from ..weights.layouts import model_types, of_model_type
from . import timm_arguments
from .trees import check_same, check_untouched, one_place

#: Attributes in which a live model may differ from a new one of its arguments: switches, which are taken along, and
#: what concerns only the patches that fill up a batch, of which there are none here, or the size of a grid before.
_RUNTIME = (
    *("fused_attn", "grad_checkpointing", "distilled_training", "weight_init_mode"),
    *("use_key_only_attn_mask", "default_img_size"),
)


def from_timm(model: Any, backend: str = "auto") -> VisionTransformer:
    """vit's model with the weights of a live one of timm: VisionTransformer (distilled, too), Eva or NaFlexVit.

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
    arguments = timm_arguments.READERS[kind](model)
    check_same(model, timm_arguments.twin(type(model), arguments), what, _RUNTIME)
    about = _about_timm(model, what)
    ours = model_class(kind)
    settings = ours.spelled({key: value for key, value in arguments.items() if key != "weight_init"})
    if not settings["dynamic_img_pad"] and timm_arguments.has_rest(settings):
        settings["drop_edge"] = True
    name = about["name"] or type(model).__name__
    if name in CONFIGS and CONFIGS[name].kind != kind:  # use_naflex=True makes a NaFlexVit under the name of another
        name = type(model).__name__
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
    known = timm_arguments.CLASSES
    found = known.get((type(model).__module__, type(model).__name__))
    if found is None:
        raise TypeError(_wrong_class(model, function, f"timm's {', '.join(name for _, name in known)}"))
    return found


def _wrong_class(model: Any, function: str, wanted: str) -> str:
    kind = type(model)
    inner = next(
        (n for n in ("module", "_orig_mod", "timm_model") if isinstance(getattr(model, n, None), nn.Module)), None
    )
    hint = f"; pass what is in it: model.{inner}" if inner is not None else ""
    return f"vit: {function} takes {wanted}, got {kind.__module__}.{kind.__qualname__}{hint}"


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
