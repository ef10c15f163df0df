"""Batches as timm's NaFlexCollator makes them: the patches of images of several sizes, filled up to one number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_NEEDED = ("patches", "patch_coord", "patch_valid")
#: What may stand beside them: the number that the patches were filled up to.
_UNUSED = ("seq_len",)


def images_of(batch: Mapping[str, Any], embeds: Any) -> list[Tensor]:
    """The images [in_chans, height, width] of a batch, each of its own size.

    patches [B, N, P * P * in_chans] or [B, N, P, P, in_chans]; patch_coord [B, N, 2]: row and column of each;
    patch_valid [B, N]: False for those that fill up. The valid patches of an image come first and are all of a grid in
    reading order. Raises ValueError, TypeError naming the key, and the image, that is something else.
    """
    patches, coordinates, valid = _checked(batch, embeds)
    images = []
    for i, count in enumerate(valid.sum(dim=1).tolist()):
        rows, columns = _grid(coordinates[i, :count], valid[i, :count], i)
        image = patches[i, :count].unflatten(0, (rows, columns)).unflatten(2, (*embeds.patch_size, embeds.in_chans))
        images.append(image.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2))  # [in_chans, rows * P, columns * P]
    return images


def _checked(batch: Mapping[str, Any], embeds: Any) -> tuple[Tensor, Tensor, Tensor]:
    """patches [B, N, P * P * in_chans]; patch_coord and patch_valid on the CPU, where grids are read from them."""
    for key in _NEEDED:
        if not isinstance(batch.get(key), Tensor):
            raise TypeError(f"vit: a batch of patches needs the tensor {key!r}, got {type(batch.get(key)).__name__}")
    if other := [key for key in batch if key not in (*_NEEDED, *_UNUSED) and batch[key] is not None]:
        raise ValueError(
            f"vit: a batch of patches has {', '.join(map(repr, other))}, which is not used here; known are "
            f"{', '.join((*_NEEDED, *_UNUSED))}"
        )
    patches, coordinates, valid = (batch[key] for key in _NEEDED)
    high, wide = embeds.patch_size
    if patches.ndim == 5 and tuple(patches.shape[2:]) == (high, wide, embeds.in_chans):
        patches = patches.flatten(2)
    if patches.ndim != 3 or patches.shape[2] != embeds.patch_values:
        raise ValueError(
            f"vit: patches must be [B, N, {embeds.patch_values}] or [B, N, {high}, {wide}, {embeds.in_chans}], got "
            f"{list(patches.shape)}; patches of another size than the model's are not resampled"
        )
    for key, tensor, shape in (("patch_coord", coordinates, [*patches.shape[:2], 2]), ("patch_valid", valid, None)):
        if list(tensor.shape) != (shape or list(patches.shape[:2])):
            raise ValueError(f"vit: {key} must be {shape or list(patches.shape[:2])}, got {list(tensor.shape)}")
    return patches, coordinates.cpu(), valid.bool().cpu()


def _grid(coordinates: Tensor, valid: Tensor, i: int) -> tuple[int, int]:
    """Rows and columns of the patches of image i."""
    count = len(coordinates)
    if not count:
        raise ValueError(f"vit: patch_valid[{i}] has no valid patch")
    if not valid.all():
        raise ValueError(f"vit: patch_valid[{i}] has valid patches behind others; those that fill up come last")
    rows, columns = (int(side) + 1 for side in coordinates.amax(dim=0))
    places = torch.arange(count, device=coordinates.device)
    whole = torch.stack([places // columns, places % columns], dim=1)
    if rows * columns != count or not torch.equal(whole, coordinates.long()):
        raise ValueError(
            f"vit: the {count} patches of patch_coord[{i}] are not all of a {rows} x {columns} grid in reading order"
        )
    return rows, columns
