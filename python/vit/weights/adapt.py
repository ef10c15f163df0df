"""Fitting a checkpoint to a model: another number of classes or channels, another patch grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..model import VisionTransformer
from ..model.configs import CONFIGS, get_config
from ..model.pos_embed import FIXED, resample, resample_patches
from .checkpoint import PATCHES, POSITIONS, Checkpoint, WeightsError, is_head
from .fit import check_head, check_names, check_pooling, rename_norm, rename_scales, without_allowed
from .layout import Mapped
from .loaded import Report, Resampled
from .tensors import check_range

log = logging.getLogger("vit")


def load_into(model: VisionTransformer, checkpoint: Checkpoint, new_head: bool = False) -> Report:
    """Copies a checkpoint into a model, adapting what has a meaningful adaptation; the report of it, which
    model.load_report keeps.

    new_head: the caller asked for this number of classes, so that a checkpoint without a head is fine too.
    Raises WeightsError naming every parameter that is missing, unexpected, of another shape or too large for the dtype.
    """
    load = _Load(model, checkpoint)
    moves = "fc_norm.weight" in load.wanted
    check_pooling(load.state, moves, {"global_pool": model.global_pool, "fc_norm": moves}, checkpoint.source)
    if load.fit_head(new_head):
        model.reset_classifier(model.num_classes)
        load.wanted = {key: value for key, value in load.wanted.items() if not is_head(key)}
    load.rename(rename_norm(load.state, moves), "moved behind the mean of the patches")
    load.rename(rename_scales(load.state, load.wanted), "renamed")
    load.fit_patches()
    load.fit_positions()
    load.leave_out()
    shapes = {key: tuple(value.shape) for key, value in load.wanted.items()}
    check_names(load.state, shapes, checkpoint.source, origin=checkpoint.origin())
    check_range(load.state, load.wanted, checkpoint.source)
    model.load_state_dict(load.state, strict=False)
    report = load.report()
    object.__setattr__(model, "load_report", report)
    return report


class _Load:
    """The tensors on their way, the parameters that want them, and what became of each so far."""

    def __init__(self, model: VisionTransformer, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint, self.source = model, checkpoint, checkpoint.source
        self.state: dict[str, Tensor] = dict(checkpoint.state)
        self.wanted: dict[str, Tensor] = model.state_dict()
        self.mapped = list(checkpoint.mapped) or [Mapped((key,), (key,), "as it is") for key in self.state]
        self.dropped, self.missing = dict(checkpoint.dropped), dict[str, str]()
        self.resampled: list[Resampled] = []

    def report(self) -> Report:
        """All of it."""
        return Report(
            self.source,
            self.checkpoint.layout,
            self.model.name,
            tuple(self.mapped),
            self.dropped,
            tuple(self.resampled),
            self.missing,
        )

    def drop(self, key: str, why: str) -> None:
        """Takes a tensor out."""
        self.state.pop(key, None)
        left = []
        for one in self.mapped:
            if one.targets == (key,):
                self.dropped |= dict.fromkeys(one.sources, why)
            else:
                left.append(one)
        self.mapped = left

    def rename(self, state: Mapping[str, Tensor], how: str) -> None:
        """The same tensors, in the same order, under other names."""
        new = {old: name for old, name in zip(self.state, state, strict=True) if old != name}
        if new and how != "renamed":
            log.info("%s: its last norm was %s", self.source, how)
        self.state = dict(state)
        self.mapped = [
            Mapped(one.sources, tuple(new.get(key, key) for key in one.targets), how)
            if any(key in new for key in one.targets)
            else one
            for one in self.mapped
        ]

    def rule(self) -> str | None:
        """How positions and patches get another size: as the model says, else as timm does for its name."""
        own = getattr(self.model.options, "pos_resize", None)
        named = get_config(self.model.name).resize if self.model.name in CONFIGS else None
        return own or named

    def leave_out(self) -> None:
        """What the caller allowed to be in the file alone, or in the model alone."""
        state, wanted = without_allowed(self.state, self.wanted, self.checkpoint.allow)
        for key in [key for key in self.state if key not in state]:
            self.drop(key, "allowed by the caller")
        self.missing |= {key: "first values, allowed by the caller" for key in self.wanted if key not in wanted}
        self.wanted = wanted

    def fit_head(self, new_head: bool) -> bool:
        """Takes a head that does not fit out; whether the model needs a new one. Says which."""
        classes = len(self.wanted["head.weight"]) if "head.weight" in self.wanted else 0
        head = self.state.get("head.weight")
        had = 0 if head is None or not head.ndim else len(head)
        if had == classes:
            return False
        width = self.wanted["head.weight"].shape[1] if classes else self.model.head_hidden_size
        check_head(self.checkpoint, classes, width, new_head)
        for key in [key for key in self.state if is_head(key)]:
            self.drop(key, f"a head for {had} classes, and the model has {classes}")
        what = f"its head for {had} classes was dropped" if head is not None else "it has no head"
        if classes:
            log.warning("%s: %s, a new one for %d classes was initialised", self.source, what, classes)
            self.missing |= {key: "newly initialised" for key in self.wanted if is_head(key)}
        elif had:
            log.info("%s: %s", self.source, what)
        return classes > 0

    def fit_patches(self) -> None:
        """Brings the projection to the model's channels, patches and layout; another width is left to check_names."""
        weight, embed = self.state.get(PATCHES), getattr(self.model, "patch_embed", None)
        if embed is None or weight is None or weight.ndim not in (2, 4) or not weight.numel():
            return
        height, width = embed.patch_size
        if weight.ndim == 2:
            if weight[0].numel() % (height * width):
                return
            weight = weight.reshape(len(weight), -1, height, width)
        if tuple(weight.shape[2:]) != (height, width):
            rule = self.rule()
            self.resampled.append(Resampled(PATCHES, tuple(weight.shape[2:]), (height, width), rule or "bicubic-aa"))
            weight = resample_patches(weight, (height, width), rule)
        if weight.shape[1] != embed.in_chans:
            log.info("patch embedding: %d image channels adapted to %d", weight.shape[1], embed.in_chans)
            rule = "summed" if embed.in_chans == 1 else "repeated and scaled"
            self.resampled.append(Resampled(PATCHES, (weight.shape[1],), (embed.in_chans,), f"channels {rule}"))
            weight = adapt_channels(weight, embed.in_chans)
        self.state[PATCHES] = weight.reshape(len(weight), *self.wanted[PATCHES].shape[1:])

    def fit_positions(self) -> None:
        """Resamples learned positions to the model's patch grid. A fixed table is the model's own."""
        table, own, model = self.state.get(POSITIONS), self.wanted.get(POSITIONS), self.model
        if own is not None and not isinstance(model.pos_embed, nn.Parameter):
            if table is not None and not _is_fixed(table, model):
                kind = model.options.pos_embed
                raise WeightsError(
                    f"vit: {self.source}: {POSITIONS} holds positions that were learned, and the model's are fixed "
                    f"(pos_embed={kind!r}), so that they would be lost; pass pos_embed='learned' to keep them, or "
                    f"take {POSITIONS} out of the state dict"
                )
            self.drop(POSITIONS, "fixed positions, which the model makes for its own grid")
            self.state[POSITIONS] = own
            self.missing[POSITIONS] = "fixed positions of the model's own"
            return
        if table is None or own is None or table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != own.shape[2]:
            return
        grid, old_grid = model.patch_embed.grid_size, self.checkpoint.grid()
        if old_grid == grid or (old_grid is None and table.shape == own.shape):
            return
        prefix, rule = own.shape[1] - math.prod(grid), self.rule()
        try:
            self.state[POSITIONS] = resample(table, grid, old_grid, prefix, rule)
        except ValueError as error:
            raise WeightsError(f"vit: {self.source}: {POSITIONS} does not fit: {error}") from error
        side = math.isqrt(table.shape[1] - prefix)
        self.resampled.append(Resampled(POSITIONS, old_grid or (side, side), grid, rule or "bicubic-aa"))
        log.info("position embedding resampled from %s to %s patches", old_grid or "a square of", grid)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch weight [dim, C, P, Q] for another number of channels, by timm's rule: summed for 1, else repeated
    (R, G, B, R, ...) and scaled by C / channels, so that equal channels give the old response."""
    old = weight.shape[1]
    if channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(channels / old), 1, 1)[:, :channels]
    return (repeated * (old / channels)).to(weight.dtype)


def _is_fixed(table: Tensor, model: VisionTransformer) -> bool:
    """Whether positions are the fixed table of some grid, as exactly as their dtype keeps it."""
    prefix, dim = model.num_prefix_tokens, model.embed_dim
    if table.shape[-1:] != (dim,):
        return True  # of another model altogether: _check_names says so
    if table.ndim != 3 or not table.is_floating_point():
        return False
    rows, near = table.shape[1] - prefix, max(1e-4, torch.finfo(table.dtype).eps)
    table = table.detach().cpu().float()

    def agrees(grid: tuple[int, int]) -> bool:
        fixed = FIXED[model.options.pos_embed](grid, dim, prefix)
        return bool((table[:, : fixed.shape[1]] - fixed).abs().max() <= near)

    # The first patch is the same in every grid: learned positions are found out by it.
    return rows > 0 and agrees((1, 1)) and any(agrees((h, rows // h)) for h in range(1, rows + 1) if rows % h == 0)
