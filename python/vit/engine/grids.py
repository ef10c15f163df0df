"""Images of other sizes than an engine's own: the weights are the same, positions are those of another grid."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import native
from .images import as_tensor
from .tensors import positions_of

#: Grids whose positions are kept: 64 of 1024 patches and 768 channels are 200 MB.
KEPT = 64


class Grids:
    """Positions for images of any size that a model takes, from a copy of what it computes them with."""

    def __init__(self, model: Any) -> None:
        names = ("blocks", "head", "head_dist", "attn_pool", "norm", "norm_pre", "fc_norm")
        left_out = {id(module): nn.Identity() for name in names if (module := getattr(model, name, None)) is not None}
        made = functools.partial(_made, copy.deepcopy(model, left_out))
        #: (height, width) -> what the native call takes, and the tensors to be kept alive meanwhile; ValueError for a
        #: size that the model does not take.
        self.of = functools.lru_cache(KEPT)(made)


@torch.inference_mode()
def _made(model: Any, height: int, width: int) -> tuple[native.Grid, list[Tensor]]:
    embed = model.patch_embed
    rows, columns = embed.grid_of(torch.empty(1, embed.in_chans, height, width, device="meta"))
    found = positions_of(model, (rows, columns))
    positions = found.get("positions")
    if positions is None:
        positions = torch.zeros(rows * columns, model.embed_dim, device="cpu")
    positions, rotary = positions.contiguous(), found.get("rotary", torch.empty(0, device="cpu")).contiguous()
    turned = rotary.data_ptr() if rotary.numel() else 0
    grid = native.Grid(height, width, positions.data_ptr(), positions.numel(), turned, rotary.numel())
    return grid, [positions, rotary]


def takes_any_size(model: Any) -> bool:
    """Whether the model's forward computes positions for the size of its images."""
    return bool(model.patch_embed.dynamic_img_size)


def by_size(images: Sequence[Any]) -> dict[tuple[Any, ...], tuple[list[int], Tensor]]:
    """Images [C, H, W] or [H, W, C]: those of one size and type as a batch, and which they are; TypeError or ValueError
    for what is no image."""
    if not len(images):
        raise ValueError("vit.Engine: the list of images is empty")
    given = [as_tensor(image) for image in images]
    for i, image in enumerate(given):
        if image.ndim != 3:
            raise ValueError(
                f"vit.Engine: in a list each image has 3 dimensions, images[{i}] has {list(image.shape)}; a batch is a "
                "tensor of its own"
            )
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, image in enumerate(given):
        groups.setdefault((image.dtype, *image.shape), []).append(i)
    return {size: (which, torch.stack([given[i] for i in which])) for size, which in groups.items()}


def of_each(
    numbers: Sequence[Sequence[int]], results: Sequence[Mapping[str, Tensor]], whole: Mapping[str, bool]
) -> dict[str, Any]:
    """The results of batches, whose images have these numbers, in the order of the numbers: a tensor [B, ...] where
    `whole` says that an output has one shape for every image, else a list."""
    rows: dict[str, dict[int, Tensor]] = {name: {} for name in whole}
    for which, found in zip(numbers, results, strict=True):
        for name, result in found.items():
            rows[name] |= dict(zip(which, result, strict=True))
    ordered = {name: [found[i] for i in range(len(found))] for name, found in rows.items()}
    return {name: torch.stack(found) if whole[name] else found for name, found in ordered.items()}
