"""`vit.create`: name, backend and weights in, a planned and loaded model out."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import BackendError, default_device, get, records
from .model.configs import get_config, model_class, nearest, resolve
from .model.options import ALIASES
from .model.vision_transformer import VisionTransformer
from .model.zoo import where_weights_are
from .preprocess import Preprocess
from .weights import Checkpoint, WeightsError, check_fit, load_into, read

log = logging.getLogger("vit")

DEFAULT_NAME = "vit_base_patch16_224"
DTYPES = ("float32", "float64", "bfloat16", "float16")


def create(
    name: str | None = None,
    backend: str = "auto",
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | Checkpoint | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    training: bool = True,
    allow: Sequence[str] = (),
    **arch: Any,
) -> VisionTransformer:
    """A Vision Transformer whose ops run on `backend`: [B, in_chans, height, width] -> [B, num_classes].

    name      one of vit.list_models(), or name.tag: the classes, image size and preprocessing of those published
              weights. None: the one the weights were saved with, else vit_base_patch16_224. No weights are downloaded.
    backend   "auto" chooses the best per op (see model.plan); a named one ("reference", "cpu", "cuda",
              "mojo", "sycl") is strict: BackendError when it cannot run the model here.
    weights   .safetensors, .npz (JAX), .pt/.pth (state dict), a run folder of `vit train`, a folder with
              model.safetensors, "hf-hub:organisation/name", or a state dict. Weights for another img_size,
              in_chans or num_classes are adapted: positions resampled, channels summed or repeated, the head
              drawn anew.
    num_classes, in_chans, img_size, and **arch (arguments of VisionTransformer)
              None: what the weights have, else the named model's value. num_classes=0 returns features.
    dtype     a torch dtype or its name; None: torch's default.
    device    None: the named backend's device; for "auto" the first usable of cuda, xpu, cpu. Under
              `with torch.device("meta")`, without weights, "auto" and "reference" take that one.
    allow     names of parameters, `*` for any text, that the weights may have beyond the model or lack; any other
              is an error. model.load_report says what became of each (vit.weights.report).
    training  False plans the forward only and returns the model in evaluation mode.

    Raises ValueError for an unknown name, argument or size, FileNotFoundError and WeightsError for weights
    that cannot be used, BackendError as above.
    """
    _check_backend(backend)
    if "pretrained" in arch or isinstance(weights, bool):
        what = "has no argument 'pretrained'" if "pretrained" in arch else f"takes no weights={weights}"
        raise ValueError(f"vit: create {what}; {where_weights_are(name or DEFAULT_NAME)}")
    checkpoint = None if weights is None else read(weights, allow=allow)
    given = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    given = {k: v for k, v in (arch | given).items() if v is not None}
    own = (
        checkpoint if checkpoint and checkpoint.describes(name) else None
    )  # the weights' own model, not just its tensors
    name, settings = settle(name, checkpoint, given)
    checkpoint = checkpoint.fitting(bool(settings.get("decoder"))) if checkpoint else None
    config = get_config(name)
    kind = model_class(config.kind)
    defaults = _check_arch([*settings, *(ALIASES.get(key, key) for key in arch)], kind.ARGUMENTS)
    if checkpoint:
        check_fit(checkpoint, defaults | settings, given, kind)
    scheme = settings.pop("weight_init", "")

    if device is None:  # under `with torch.device("meta")` a model without values, to be given them
        dry = backend in ("auto", "reference") and checkpoint is None and torch.get_default_device().type == "meta"
        device = "meta" if dry else default_device(backend)
    place: dict[str, Any] = {"device": torch.device(device), "dtype": _dtype(dtype)}
    first = "skip" if checkpoint and not checkpoint.allow else scheme
    try:
        model = kind(**settings, weight_init=first, backend=backend, training=training, name=name, **place)
    except ValueError as error:
        if own is None or given:
            raise
        raise WeightsError(f"vit: {own.source}: {str(error).removeprefix('vit: ')}") from error
    model.weight_init = scheme
    model.preprocess = _preprocess(config.preprocess, own, model, "img_size" in given)
    if checkpoint:
        load_into(model, checkpoint, new_head=num_classes is not None)
        names = checkpoint.class_names or ()
        if len(names) == model.num_classes:
            model.class_names = checkpoint.class_names
        elif names and "num_classes" not in given:
            log.warning(
                "%s: its %d class names are not those of %d classes", checkpoint.source, len(names), model.num_classes
            )
    return model


def settle(name: str | None, checkpoint: Checkpoint | None, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a model and its arguments: those of the named model, over them the weights', over them `given`."""
    settings: dict[str, Any] = {}
    own = None
    if checkpoint:
        settings = checkpoint.settings(name)
        own = None if name else checkpoint.model_name()
    name = resolve(name or own or DEFAULT_NAME)
    try:
        config = get_config(name)
    except ValueError as error:
        if own is None or checkpoint is None:
            raise
        raise WeightsError(f"vit: {checkpoint.source}: {str(error).removeprefix('vit: ')}") from None
    spelled = model_class(config.kind).spelled
    return name, {**config.arch, **spelled(settings), **spelled(given)}


def _check_backend(backend: str) -> None:
    """Before anything is read or built: a named backend must be usable on this machine at all."""
    if backend == "auto" or (why := get(backend).unavailable()) is None:
        return
    others = ", ".join(name for name, record in records().items() if record.unavailable() is None)
    raise BackendError(
        f"vit: backend '{backend}' cannot be used on this machine: {why}\n"
        f'Usable here: {others}. Use one of them, or backend="auto" for the best of them per op.'
    )


#: Arguments of timm.create_model that are none of a model, and what does the same here.
_OF_TIMM = {
    "checkpoint_path": "weights=FILE does the same",
    "features_only": "model.forward_intermediates(images, indices=...) gives the features of blocks",
    "out_indices": "model.forward_intermediates(images, indices=...) gives the features of blocks",
    "pretrained_cfg": "a folder with config.json as weights= brings it; model.preprocess can be set",
    "pretrained_cfg_overlay": "a folder with config.json as weights= brings it; model.preprocess can be set",
    "scriptable": "torch.jit.trace(model, images) and torch.export.export(model, (images,)) make a graph of any model",
    "exportable": "every model can be exported",
}


def _check_arch(names: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Refuses what is no argument of a model; the defaults of those that are."""
    for key in names:
        if key not in defaults:
            if key in _OF_TIMM:
                raise ValueError(f"vit: create has no argument {key!r} of timm.create_model: {_OF_TIMM[key]}")
            near = nearest(key, (*defaults, *ALIASES))
            hint = f"; did you mean {', '.join(near)}?" if near else "."
            raise ValueError(f"vit: create has no argument {key!r}{hint} Allowed: {', '.join(defaults)}")
    return dict(defaults)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return torch.get_default_dtype()
    found = getattr(torch, dtype, None) if dtype in DTYPES else dtype
    if not isinstance(found, torch.dtype) or str(found).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"vit: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return found


def _preprocess(
    named: Mapping[str, Any], checkpoint: Checkpoint | None, model: VisionTransformer, sized: bool
) -> Preprocess:
    """The weights' own transform, else the named model's, at the size and channels of this model. sized: the caller
    asked for the image size, so that it need not be that of the weights."""
    values = dict(named)
    if checkpoint and checkpoint.preprocess:
        values |= checkpoint.preprocess
        taken = model.patch_embed.img_size
        made = _pair(values.get("img_size", taken))
        if made != taken and not sized:
            raise WeightsError(
                f"vit: {checkpoint.source}: the transform beside it makes images of {list(made)} pixels, and the model "
                f"takes {list(taken)}; pass img_size"
            )
    try:
        return preprocess_for(values, model)
    except ValueError as error:
        if not (checkpoint and checkpoint.preprocess):
            raise
        raise WeightsError(f"vit: {checkpoint.source}: {str(error).removeprefix('vit: ')}") from None


def _pair(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def preprocess_for(arguments: Mapping[str, Any], model: VisionTransformer) -> Preprocess:
    """A transform of these arguments at the size and channels of the model."""
    values = {**arguments, "img_size": model.patch_embed.img_size, "in_chans": model.patch_embed.in_chans}
    if (most := getattr(model.options, "max_num_patches", None)) is not None:
        values |= {"max_num_patches": most, "patch_size": max(model.patch_embed.patch_size)}
    for statistic in ("mean", "std"):
        per_channel = values.get(statistic, (0.5,))
        if len(per_channel) not in (1, values["in_chans"]):  # statistics of images with other channels
            values[statistic] = (sum(per_channel) / len(per_channel),)
    return Preprocess.from_dict(values)
