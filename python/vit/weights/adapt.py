"""Fitting a checkpoint to a model: another number of classes or channels, another patch grid."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from ..model import VisionTransformer
from ..model.pos_embed import resample, sincos2d
from .checkpoint import HEAD, PATCHES, POSITIONS, Checkpoint, WeightsError
from .fit import check_head, check_names, check_pooling, rename_norm
from .tensors import check_range

log = logging.getLogger("vit")


def load_into(model: VisionTransformer, checkpoint: Checkpoint, new_head: bool = False) -> None:
    """Copies a checkpoint into a model, adapting what has a meaningful adaptation.

    new_head: the caller asked for this number of classes, so that a checkpoint without a head is fine too.
    Raises WeightsError naming every parameter that is missing, unexpected, of another shape or too large for the dtype.
    """
    state, wanted = dict(checkpoint.state), model.state_dict()
    settings = {"global_pool": model.global_pool, "fc_norm": "fc_norm.weight" in wanted}
    check_pooling(state, settings, checkpoint.source)
    if _fit_head(state, wanted, checkpoint, model.embed_dim, new_head):
        model.reset_classifier(model.num_classes)
        wanted = {key: value for key, value in wanted.items() if key not in HEAD}
    had_norm = "norm.weight" in state
    state = rename_norm(state, settings)
    if had_norm and "norm.weight" not in state:
        log.info("%s: its last norm was moved behind the mean of the patches", checkpoint.source)
    _fit_patches(state, wanted, model)
    _fit_positions(state, wanted, model, checkpoint)
    check_names(
        state, {key: tuple(value.shape) for key, value in wanted.items()}, checkpoint.source, 0, checkpoint.origin()
    )
    check_range(state, wanted, checkpoint.source)
    model.load_state_dict(state, strict=False)


def _fit_head(
    state: dict[str, Tensor], wanted: dict[str, Tensor], checkpoint: Checkpoint, embed_dim: int, new_head: bool
) -> bool:
    """Takes a head that does not fit out of `state`; whether the model needs a new one. Says which."""
    classes = len(wanted["head.weight"]) if "head.weight" in wanted else 0
    head = state.get("head.weight")
    had = 0 if head is None or not head.ndim else len(head)
    if had == classes:
        return False
    check_head(checkpoint, classes, embed_dim, new_head)
    for key in HEAD:
        state.pop(key, None)
    what = f"its head for {had} classes was dropped" if head is not None else "it has no head"
    if classes:
        log.warning("%s: %s, a new one for %d classes was initialised", checkpoint.source, what, classes)
    elif had:
        log.info("%s: %s", checkpoint.source, what)
    return classes > 0


def _fit_patches(state: dict[str, Tensor], wanted: dict[str, Tensor], model: VisionTransformer) -> None:
    """Brings the projection to the model's channels and layout; a patch of another size is left to _check_names."""
    weight, embed = state.get(PATCHES), model.patch_embed
    patch_height, patch_width = embed.patch_size
    if weight is None or weight.ndim not in (2, 4) or not weight.numel():
        return
    if weight[0].numel() % (patch_height * patch_width):
        return
    if weight.ndim == 4 and tuple(weight.shape[2:]) != embed.patch_size:
        return
    weight = weight.reshape(len(weight), -1, patch_height, patch_width)
    if weight.shape[1] != embed.in_chans:
        log.info("patch embedding: %d image channels adapted to %d", weight.shape[1], embed.in_chans)
        weight = adapt_channels(weight, embed.in_chans)
    state[PATCHES] = weight.reshape(len(weight), *wanted[PATCHES].shape[1:])


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch weight [dim, C, P, Q] for another number of channels, by timm's rule: summed for 1, else repeated
    (R, G, B, R, ...) and scaled by C / channels, so that equal channels give the old response."""
    old = weight.shape[1]
    if channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(channels / old), 1, 1)[:, :channels]
    return (repeated * (old / channels)).to(weight.dtype)


def _fit_positions(
    state: dict[str, Tensor], wanted: dict[str, Tensor], model: VisionTransformer, checkpoint: Checkpoint
) -> None:
    """Resamples learned positions to the model's patch grid. A fixed table is the model's own, right for its grid."""
    table, own = state.get(POSITIONS), wanted.get(POSITIONS)
    if own is not None and not isinstance(model.pos_embed, nn.Parameter):
        if table is not None and not _is_sincos2d(table, model):
            raise WeightsError(
                f"vit: {checkpoint.source}: {POSITIONS} holds positions that were learned, and the model's are fixed "
                "(pos_embed='sincos2d'), so that they would be lost; pass pos_embed='learned' to keep them, or take "
                f"{POSITIONS} out of the state dict"
            )
        state[POSITIONS] = own
        return
    if table is None or own is None or table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != own.shape[2]:
        return
    grid, old_grid = model.patch_embed.grid_size, checkpoint.grid()
    if old_grid == grid or (old_grid is None and table.shape == own.shape):
        return
    try:
        state[POSITIONS] = resample(table, grid, old_grid, model.num_prefix_tokens)
    except ValueError as error:
        raise WeightsError(f"vit: {checkpoint.source}: {POSITIONS} does not fit: {error}") from error
    log.info("position embedding resampled from %s to %s patches", old_grid or "a square of", grid)


def _is_sincos2d(table: Tensor, model: VisionTransformer) -> bool:
    """Whether positions are the fixed table of some grid, as exactly as their dtype keeps it."""
    prefix, dim = model.num_prefix_tokens, model.embed_dim
    if table.shape[-1:] != (dim,):
        return True  # of another model altogether: _check_names says so
    if table.ndim != 3 or not table.is_floating_point():
        return False
    rows, near = table.shape[1] - prefix, max(1e-4, torch.finfo(table.dtype).eps)
    table = table.detach().cpu().float()

    def agrees(grid: tuple[int, int]) -> bool:
        fixed = sincos2d(grid, dim, prefix)
        return bool((table[:, : fixed.shape[1]] - fixed).abs().max() <= near)

    # The first patch is the same in every grid: learned positions are found out by it.
    return rows > 0 and agrees((1, 1)) and any(agrees((h, rows // h)) for h in range(1, rows + 1) if rows % h == 0)
