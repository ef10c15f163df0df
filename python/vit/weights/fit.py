"""Whether weights fit a model, found out from sizes alone, before anything is built: a record that says 30,000 blocks
costs what the file beside it holds, no more."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..model import checks
from ..support.text import printable
from .checkpoint import HEAD, PATCHES, POSITIONS, Checkpoint, WeightsError, some

#: Fixed positions of more patches than this are made only for a caller who asks for the image size.
MOST_PATCHES = 1 << 20


def check_fit(checkpoint: Checkpoint, settings: Mapping[str, Any], given: Collection[str]) -> None:
    """Compares the tensors with the arguments of the model that is about to be built.

    settings: all arguments of VisionTransformer; given: the names of those that the caller asked for, to which
    weights are adapted. What is only written beside the tensors must agree with them.

    Raises WeightsError naming what does not, ValueError for arguments that no model can have.
    """
    checks.classes(settings["num_classes"])
    checks.positive(**{key: settings[key] for key in ("in_chans", "embed_dim", "depth", "num_heads")})
    checks.number(0.0, mlp_ratio=settings["mlp_ratio"])
    checks.number(0.0, mlp_width=settings["embed_dim"] * settings["mlp_ratio"])
    check_pooling(checkpoint.state, settings, checkpoint.source)
    _check_ends(checkpoint, settings, given)
    check_head(checkpoint, settings["num_classes"], settings["embed_dim"], "num_classes" in given)
    state = {key: value for key, value in checkpoint.state.items() if key not in (*HEAD, POSITIONS)}
    state = rename_norm(state, settings)
    have = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    depth = settings["depth"]
    wanted = dict(_expected(settings, min(depth, have + 1)))
    if PATCHES in state and PATCHES not in _misshapen_patches(state[PATCHES], settings):
        del state[PATCHES], wanted[PATCHES]
    check_names(state, wanted, checkpoint.source, 12 * max(0, depth - have - 1), checkpoint.origin())


def moves_norm(settings: Mapping[str, Any]) -> bool:
    """Whether the last norm stands behind the pooling, where it is called fc_norm."""
    fc_norm = settings.get("fc_norm")
    return settings["global_pool"] == "avg" if fc_norm is None else bool(fc_norm)


def rename_norm(state: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Pooling by average moves the last norm of a model with another pooling behind the mean, and renames it."""
    if not moves_norm(settings) or "fc_norm.weight" in state:
        return state
    return {("fc_" + key if key in ("norm.weight", "norm.bias") else key): value for key, value in state.items()}


def check_pooling(state: Mapping[str, Tensor], settings: Mapping[str, Any], source: str) -> None:
    """Refuses weights trained with the mean of the patches for a model with another pooling."""
    if "fc_norm.weight" in state and "norm.weight" not in state and not moves_norm(settings):
        raise WeightsError(
            f"vit: {source} does not fit the model: it holds fc_norm.weight, the norm behind the mean of the patches "
            f"(global_pool='avg'), and the model has global_pool={settings['global_pool']!r}"
            f"{'' if settings.get('fc_norm') is None else ', fc_norm=' + str(settings['fc_norm'])}; "
            "leave these out to take those of the weights"
        )


def check_head(checkpoint: Checkpoint, classes: int, width: int, new_head: bool) -> None:
    """Refuses weights without a head for a model with one, unless the caller asked for a new one, and odd ones."""
    head, bias = (checkpoint.state.get(key) for key in HEAD)
    if classes and head is not None and (head.ndim != 2 or not len(head) or head.shape[1] != width):
        raise WeightsError(
            f"vit: {checkpoint.source} does not fit the model:\n"
            f"  shape       head.weight {list(head.shape)} instead of [classes, {width}]"
        )
    if classes and head is None and bias is not None:
        raise WeightsError(f"vit: {checkpoint.source} has a head.bias without the head.weight that belongs to it")
    if classes and "head.weight" not in checkpoint.state and not new_head:
        behind = " that this model can use" if any("head" in key for key in checkpoint.dropped) else ""
        raise WeightsError(
            f"vit: {checkpoint.source} has no classifier head{behind}; "
            "pass num_classes=0 for features or num_classes=N for a new head"
        )


def _check_ends(checkpoint: Checkpoint, settings: Mapping[str, Any], given: Collection[str]) -> None:
    """What is written beside the tensors of classes, channels and image size against the tensors."""
    state = checkpoint.state
    image, patch = checks.sides("img_size", settings["img_size"]), checks.sides("patch_size", settings["patch_size"])
    wrong = []
    tensors = checkpoint.sizes()
    for key, name in (("num_classes", "head.weight"), ("in_chans", PATCHES)):
        if key in tensors and key not in given and settings[key] != tensors[key]:
            wrong.append(f"{key} {settings[key]}, and {name} has {tensors[key]}")
    if "img_size" not in given and settings["pos_embed"] != "none":
        count = math.prod(-(-side // size) for side, size in zip(image, patch, strict=True))
        table = state.get(POSITIONS)
        rows = None if table is None or table.ndim != 3 else table.shape[1]
        prefix = int(settings["class_token"])
        if "img_size" in checkpoint.arch and rows is not None and rows != prefix + count and "patch_size" not in given:
            wrong.append(f"img_size {list(image)} ({count} patches), and {POSITIONS} has {rows} rows")
        elif rows is None and count > MOST_PATCHES:
            wrong.append(f"img_size {list(image)} ({count} patches), and no {POSITIONS}")
    if wrong:
        raise WeightsError(
            f"vit: {checkpoint.source} does not fit what is written beside it: {'; '.join(wrong)}. Pass the right "
            "value to vit.create, or the weights file itself"
        )


def _misshapen_patches(weight: Tensor, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The patch projection's name where it cannot be adapted: only its channels and its layout can."""
    patch = checks.sides("patch_size", settings["patch_size"])
    fits = weight.ndim in (2, 4) and len(weight) == settings["embed_dim"] and weight[:1].numel() > 0
    fits = fits and (tuple(weight.shape[2:]) == patch if weight.ndim == 4 else weight.shape[1] % math.prod(patch) == 0)
    return () if fits else (PATCHES,)


def _expected(settings: Mapping[str, Any], depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's parameters, without its head and its positions."""
    C, hidden = settings["embed_dim"], int(settings["embed_dim"] * settings["mlp_ratio"])
    patch = checks.sides("patch_size", settings["patch_size"])
    if settings["class_token"]:
        yield "cls_token", (1, 1, C)
    yield PATCHES, (C, settings["in_chans"], *patch)
    yield "patch_embed.proj.bias", (C,)
    for i in range(depth):
        block = {"norm1": (C,), "norm2": (C,), "attn.qkv": (3 * C, C), "attn.proj": (C, C)}
        block |= {"mlp.fc1": (hidden, C), "mlp.fc2": (C, hidden)}
        for name, shape in block.items():
            yield f"blocks.{i}.{name}.weight", shape
            if name != "attn.qkv" or settings["qkv_bias"]:
                yield f"blocks.{i}.{name}.bias", shape[:1]
    norm = "fc_norm" if moves_norm(settings) else "norm"
    yield f"{norm}.weight", (C,)
    yield f"{norm}.bias", (C,)


def check_names(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[int, ...]],
    source: str,
    more: int = 0,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Refuses names that are missing (and `more` of them beyond `wanted`) or unexpected, and shapes that differ.
    origin: timm's names -> those in the file, where they are other ones."""
    origin = origin or {}
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(shape)}"
        for key, shape in wanted.items()
        if key in state and tuple(state[key].shape) != tuple(shape)
    ]
    if not (missing or unexpected or shapes):
        return
    lines = [f"vit: {source} does not fit the model:"]
    if missing:
        lines.append(f"  missing     {_list(missing, more)}")
    if unexpected:
        near = [_named(key, wanted, origin.get(key, key)) for key in unexpected[:12]]
        lines.append(f"  unexpected  {_list(near, len(unexpected) - len(near))}")
    if shapes:
        lines.append(f"  shape       {_list(shapes)}")
    lines.append("Create the model with the sizes the weights were made for (name, patch_size, embed_dim, depth, ...)")
    raise WeightsError("\n".join(lines))


def _list(names: list[str], more: int = 0) -> str:
    rest = max(0, len(names) - 12) + more
    return printable(some(names[:12])) + (f" and {rest} more" if rest else "")


def _named(key: str, wanted: Collection[str], origin: str) -> str:
    """An unexpected name: as it stands in the file, what it means, and else which name is nearest."""
    if origin != key:
        return f"{origin[:200]} ({key})"
    near = difflib.get_close_matches(key[:200], wanted, n=1)
    return f"{key[:200]} (nearest: {near[0]})" if near else key[:200]
