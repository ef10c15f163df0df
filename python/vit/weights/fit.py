"""Whether weights fit a model, found out from sizes alone, before anything is built: a record that says 30,000 blocks
costs what the file beside it holds, no more."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ..model import checks
from ..model.patches import grid_of_positions
from ..model.pos_embed import FIXED
from ..support.text import printable
from .checkpoint import HEAD, PATCHES, POSITIONS, Checkpoint, WeightsError, is_head, some

#: Fixed positions of more patches than this are made only for a caller who asks for the image size.
MOST_PATCHES = 1 << 20


def check_fit(
    checkpoint: Checkpoint, settings: Mapping[str, Any], given: Collection[str], kind: type[nn.Module]
) -> None:
    """Compares the tensors with the arguments of the model that is about to be built.

    settings: all arguments of the model; given: the names of those that the caller asked for, to which weights are
    adapted; kind: the class of the model. What is only written beside the tensors must agree with them.

    Raises WeightsError naming what does not, ValueError for arguments that no model can have.
    """
    try:
        _check_fit(checkpoint, settings, given, kind)
    except WeightsError as error:
        if (hint := _wrapped_layers(checkpoint.state)) is None:
            raise
        raise WeightsError(f"{error}\n{hint}") from error


#: Parts of names that say a layer was wrapped when it was saved -> by what, and what takes the wrapper off.
_WRAPPERS = (
    (("base_layer", "lora_A", "lora_B", "modules_to_save"), "an adapter of peft", "model.merge_and_unload()"),
    (("parametrizations",), "torch.nn.utils.parametrize", "parametrize.remove_parametrizations(layer, name)"),
    (("weight_g", "weight_v"), "weight norm", "torch.nn.utils.remove_weight_norm(layer)"),
    (("weight_orig", "weight_mask"), "pruning or spectral norm", "torch.nn.utils.prune.remove(layer, name)"),
)


def _wrapped_layers(state: Collection[str]) -> str | None:
    for parts, wrapper, way_out in _WRAPPERS:
        if (key := next((key for key in state if not set(parts).isdisjoint(key.split("."))), None)) is not None:
            return f"{printable(key[:200])} was saved under {wrapper}; {way_out} before saving gives plain weights"
    return None


def _check_fit(
    checkpoint: Checkpoint, settings: Mapping[str, Any], given: Collection[str], kind: type[nn.Module]
) -> None:
    """What check_fit does, without its advice."""
    checks.classes(settings["num_classes"])
    if settings["num_heads"] is None:
        raise WeightsError(
            f"vit: {checkpoint.source}: the number of heads stands in no tensor, and no named model has embed_dim "
            f"{settings['embed_dim']} and depth {settings['depth']}; pass num_heads, or the name of a model"
        )
    checks.positive(**{key: settings[key] for key in ("in_chans", "embed_dim", "depth", "num_heads")})
    checks.number(0.0, mlp_ratio=settings["mlp_ratio"])
    checks.number(0.0, mlp_width=settings["embed_dim"] * settings["mlp_ratio"])
    state = {key: value for key, value in checkpoint.state.items() if not is_head(key) and key != POSITIONS}
    have = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    depth = settings["depth"]
    _check_ends(checkpoint, settings, given)
    try:
        wanted = _expected(kind, settings, min(depth, have + 1))
    except ValueError as error:
        if given:
            raise
        raise WeightsError(f"vit: {checkpoint.source}: {str(error).removeprefix('vit: ')}") from error
    except (RuntimeError, TypeError) as error:  # PyTorch counts bytes in 63 bits, also of tensors without memory
        if "overflow" not in str(error).lower():
            raise
        sizes = ", ".join(f"{key} {settings[key]}" for key in ("embed_dim", "mlp_ratio", "in_chans", "patch_size"))
        raise WeightsError(f"vit: {checkpoint.source}: no memory holds a model of {sizes}") from error
    check_pooling(checkpoint.state, "fc_norm.weight" in wanted, settings, checkpoint.source)
    state = rename_scales(rename_norm(state, "fc_norm.weight" in wanted), wanted)
    if PATCHES in state and PATCHES not in _misshapen_patches(state[PATCHES], settings, "patch_size" in given):
        state.pop(PATCHES)
        wanted.pop(PATCHES, None)
    state, wanted = without_allowed(state, wanted, checkpoint.allow)
    for key in [key for key in wanted if key.startswith("rope.")]:  # one table for all blocks, of another depth here
        if key in state:
            del state[key], wanted[key]
    blocks = 12 * max(0, depth - have - 1)
    check_names(state, wanted, checkpoint.source, blocks, checkpoint.origin())
    # After the names: of another family's weights the head is the least.
    width = (settings.get("representation_size") or settings["embed_dim"], *(settings.get("decoder") or ()))[-1]
    check_head(checkpoint, settings["num_classes"], width, "num_classes" in given)


def _expected(kind: type[nn.Module], settings: Mapping[str, Any], depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, without its head and its positions, for the first `depth` blocks.

    All blocks are alike, so that one is built, without memory.
    """
    changed = {"depth": 1, "weight_init": "skip", "drop_path_rate": 0.0}
    if settings.get("pos_embed") in FIXED:  # a table of its own, of any number of rows
        changed["pos_embed"] = "none"
    model = kind(**{**settings, **changed}, backend="reference", device="meta")
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if is_head(name) or name == POSITIONS:
            continue
        for i in range(depth) if name.startswith("blocks.0.") else (0,):
            found[name.replace("blocks.0.", f"blocks.{i}.")] = tuple(tensor.shape)
    order = {name: place for place, name in enumerate(found)}
    return dict(sorted(found.items(), key=lambda item: (_block(item[0]), order[item[0]])))


def _block(name: str) -> int:
    """The number of a parameter's block; -1 before the first, a large number behind the last."""
    if name.startswith("blocks."):
        return int(name.split(".")[1])
    return 1 << 30 if name.startswith(("norm.", "fc_norm.", "attn_pool.", "head")) else -1


def rename_norm(state: dict[str, Any], moves: bool) -> dict[str, Any]:
    """Pooling by average moves the last norm of a model with another pooling behind the mean, and renames it."""
    if not moves or "fc_norm.weight" in state:
        return state
    return {("fc_" + key if key in ("norm.weight", "norm.bias") else key): value for key, value in state.items()}


def rename_scales(state: dict[str, Any], wanted: Collection[str]) -> dict[str, Any]:
    """DeiT-3's own files call LayerScale as EVA does: gamma_1, where timm's VisionTransformer has ls1.gamma."""
    if "blocks.0.gamma_1" not in state or "blocks.0.ls1.gamma" not in wanted:
        return state
    return {key.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma"): v for key, v in state.items()}


def without_allowed(
    state: dict[str, Any], wanted: Mapping[str, Any], allow: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both without the names, alone in one of them, that the caller allowed by name or wildcard."""

    def allowed(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, one) for one in allow)

    kept = {key: value for key, value in state.items() if key in wanted or not allowed(key)}
    return kept, {key: value for key, value in wanted.items() if key in state or not allowed(key)}


def check_pooling(state: Mapping[str, Tensor], moves: bool, settings: Mapping[str, Any], source: str) -> None:
    """Refuses weights trained with the mean of the patches for a model with another pooling."""
    if "fc_norm.weight" in state and "norm.weight" not in state and not moves:
        raise WeightsError(
            f"vit: {source} does not fit the model: it holds fc_norm.weight, the norm behind the mean of the patches "
            f"(global_pool='avg'), and the model has global_pool={settings['global_pool']!r}"
            f"{'' if settings.get('fc_norm') is None else ', fc_norm=' + str(settings['fc_norm'])}; "
            "leave these out to take those of the weights"
        )


def check_head(checkpoint: Checkpoint, classes: int, width: int, new_head: bool) -> None:
    """Refuses weights without a head for a model with one, unless the caller asked for a new one, and odd ones."""
    head, bias = (checkpoint.state.get(key) for key in HEAD[:2])
    if classes and head is not None and (head.ndim != 2 or not len(head) or head.shape[1] != width):
        both = head.ndim == 2 and head.shape[1] == 2 * width and "DINOv2" in checkpoint.layout
        raise WeightsError(
            f"vit: {checkpoint.source} does not fit the model:\n"
            f"  shape       head.weight {list(head.shape)} instead of [classes, {width}]"
            + (
                "\nIt reads the class token and the mean of the patches; pass num_classes=0 for features"
                if both
                else ""
            )
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
    image = checks.sides("img_size", settings["img_size"])
    wrong = []
    tensors = checkpoint.sizes()
    for key, name in (("num_classes", "head.weight"), ("in_chans", PATCHES)):
        if key in tensors and key not in given and settings[key] != tensors[key]:
            wrong.append(f"{key} {settings[key]}, and {name} has {tensors[key]}")
    if "img_size" not in given and settings.get("pos_embed", "learned") != "none":
        count = math.prod(grid_of_positions(settings))
        table = state.get(POSITIONS)
        rows = None if table is None or table.ndim != 3 else table.shape[1]
        prefix = position_rows_of_prefix(settings) + ("dist_token" in state)
        if "img_size" in checkpoint.arch and rows is not None and rows != prefix + count and "patch_size" not in given:
            wrong.append(f"img_size {list(image)} ({count} patches), and {POSITIONS} has {rows} rows")
        elif rows is None and count > MOST_PATCHES:
            wrong.append(f"img_size {list(image)} ({count} patches), and no {POSITIONS}")
    if wrong:
        raise WeightsError(
            f"vit: {checkpoint.source} does not fit what is written beside it: {'; '.join(wrong)}. Pass the right "
            "value to vit.create, or the weights file itself"
        )


def position_rows_of_prefix(settings: Mapping[str, Any]) -> int:
    """How many tokens before the patches have a row in the position embedding."""
    if settings.get("no_embed_class"):
        return 0
    registers = settings.get("reg_tokens", settings.get("num_reg_tokens", 0))
    return int(settings.get("class_token", True)) + int(registers or 0)


def _misshapen_patches(weight: Tensor, settings: Mapping[str, Any], resized: bool) -> tuple[str, ...]:
    """The patch projection's name where it cannot be adapted: its channels and its layout can, and its patches where
    the caller asks for their size."""
    patch = checks.sides("patch_size", settings["patch_size"])
    fits = weight.ndim in (2, 4) and len(weight) == settings["embed_dim"] and weight[:1].numel() > 0
    if weight.ndim == 4:
        fits = fits and (resized or tuple(weight.shape[2:]) == patch)
    else:
        fits = fits and weight.shape[1] % math.prod(patch) == 0
    return () if fits else (PATCHES,)


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
