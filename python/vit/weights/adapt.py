"""Fitting a checkpoint to a model: another number of classes or channels, another patch grid, missing
names."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..model import pos_embed
from .checkpoint import Checkpoint, WeightsError

log = logging.getLogger("vit")

HEAD = ("head.weight", "head.bias")
PATCHES = "patch_embed.proj.weight"


def load_into(model: Any, checkpoint: Checkpoint, new_head: bool = False) -> None:
    """Copies a checkpoint into a VisionTransformer, adapting what has a meaningful adaptation.

    new_head: the caller asked for this number of classes, so that a checkpoint without a head is fine too.
    Raises WeightsError naming every parameter that is missing, unexpected, of another shape or not finite.
    """
    state = dict(checkpoint.state)
    wanted = model.state_dict()
    check_finite(state, checkpoint.source)
    _fit_head(state, wanted, checkpoint.source, new_head)
    _fit_norm(state, wanted)
    _fit_patches(state, wanted)
    _fit_positions(state, wanted, model, checkpoint)
    _check_names(state, wanted, checkpoint.source, fresh=HEAD if new_head else ())
    model.load_state_dict(state, strict=False)


def check_finite(state: dict[str, Tensor], source: str) -> None:
    """WeightsError naming the parameters that hold NaN or infinities."""
    bad = [
        key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if bad:
        raise WeightsError(
            f"vit: {source}: NaN or infinite values in {_some(bad)}. The training that wrote it diverged; "
            "use an "
            "earlier checkpoint, or repair the tensors of vit.weights.load(...) and pass the state dict "
            "as weights"
        )


def _fit_head(state: dict[str, Tensor], wanted: dict[str, Tensor], source: str, new_head: bool) -> None:
    if "head.weight" not in wanted:  # num_classes=0: features
        for key in HEAD:
            state.pop(key, None)
    elif "head.weight" not in state:
        if not new_head:
            raise WeightsError(
                f"vit: {source} has no classifier head; pass num_classes=0 for features or num_classes=N "
                "for a new head"
            )
        log.warning(
            "%s has no head: a new one for %d classes was initialised", source, len(wanted["head.weight"])
        )
    elif len(state["head.weight"]) != len(wanted["head.weight"]):
        had, has = len(state["head.weight"]), len(wanted["head.weight"])
        log.warning("%s: its head for %d classes was dropped, a new one for %d initialised", source, had, has)
        for key in HEAD:
            state.pop(key, None)


def _fit_norm(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Pooling by average moves the last norm behind the pooling and renames it."""
    for old, new in (("norm", "fc_norm"), ("fc_norm", "norm")):
        if f"{new}.weight" in wanted and f"{new}.weight" not in state:
            for kind in ("weight", "bias"):
                if f"{old}.{kind}" in state:
                    state[f"{new}.{kind}"] = state.pop(f"{old}.{kind}")


def _fit_patches(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    weight = state.get(PATCHES)
    if weight is None or weight.ndim != 4 or wanted[PATCHES].ndim != 4:
        return
    channels = wanted[PATCHES].shape[1]
    if weight.shape[1] == 3 and channels != 3:
        state[PATCHES] = adapt_channels(weight, channels)
        log.info("patch embedding: 3 image channels adapted to %d", channels)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """An RGB patch weight [dim, 3, P, Q] for another number of channels, as timm does: summed for 1, else
    repeated (R, G, B, R, ...) and scaled by 3 / channels, so that equal channels give the old response."""
    if channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels]
    return (repeated * (3 / channels)).to(weight.dtype)


def _fit_positions(
    state: dict[str, Tensor], wanted: dict[str, Tensor], model: Any, checkpoint: Checkpoint
) -> None:
    table, own = state.get("pos_embed"), wanted.get("pos_embed")
    if table is None or own is None or table.ndim != 3 or table.shape[2] != own.shape[2]:
        return
    grid = model.patch_embed.grid_size
    if not isinstance(model.pos_embed, torch.nn.Parameter):  # fixed: the model's own is right for its grid
        state["pos_embed"] = own
        return
    old_grid = checkpoint.grid or _square(table.shape[1] - model.num_prefix_tokens)
    if old_grid is None and table.shape == own.shape:
        return  # a rectangular grid; equal token counts and nothing that says otherwise
    if old_grid != grid:
        state["pos_embed"] = pos_embed.resample(table, grid, old_grid, model.num_prefix_tokens)
        log.info("position embedding resampled from %s to %s patches", old_grid or "a square of", grid)


def _square(rows: int) -> tuple[int, int] | None:
    side = math.isqrt(max(rows, 0))
    return (side, side) if side * side == rows else None


def _check_names(
    state: dict[str, Tensor], wanted: dict[str, Tensor], source: str, fresh: Iterable[str]
) -> None:
    missing = [
        key for key in wanted if key not in state and key not in fresh and not _dropped(key, state, wanted)
    ]
    unexpected = [key for key in state if key not in wanted]
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape and not _same_patches(key, state, wanted)
    ]
    if not (missing or unexpected or shapes):
        return
    lines = [f"vit: {source} does not fit the model:"]
    if missing:
        lines.append(f"  missing     {_some(missing)}")
    if unexpected:
        named = []
        for key in unexpected:
            near = difflib.get_close_matches(key, wanted, n=1)
            named.append(f"{key} (nearest: {near[0]})" if near else key)
        lines.append(f"  unexpected  {_some(named)}")
    if shapes:
        lines.append(f"  shape       {_some(shapes)}")
    lines.append(
        "Create the model with the sizes the weights were made for (name, patch_size, embed_dim, depth, ...)."
    )
    raise WeightsError("\n".join(lines))


def _dropped(key: str, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """A head that _fit_head took out, having said so."""
    return key in HEAD and not any(head in state for head in HEAD)


def _same_patches(key: str, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """The two layouts of the patch projection, which load into each other."""
    return (
        key == PATCHES and state[key].ndim != wanted[key].ndim and state[key].numel() == wanted[key].numel()
    )


def _some(names: list[str], limit: int = 12) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
