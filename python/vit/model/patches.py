"""Images cut into patches and put together again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .checks import sides


def patchify(
    images: Tensor,
    patch_size: int | tuple[int, int],
    copy: Callable[[Tensor], Tensor] = Tensor.contiguous,
    stride: int | tuple[int, int] | None = None,
) -> Tensor:
    """Images [B, C, H, W] -> patches [B, N, C * P * Q] in reading order, each patch in the order [C, P, Q].

    `copy` makes a view contiguous. stride: pixels from one patch to the next, where that is not the patch's side; then
    N = ((H - P) // stride + 1) ((W - Q) // stride + 1).
    Raises ValueError when H or W is not a multiple of the patch, or with a stride smaller than it.
    """
    P, Q = sides("patch_size", patch_size)
    B, C, H, W = images.shape
    step = (P, Q) if stride is None else sides("stride", stride)
    if step != (P, Q):
        if H < P or W < Q:
            raise ValueError(f"vit: patchify: images of {H} x {W} are smaller than the patch size {P} x {Q}")
        x = images.unfold(2, P, step[0]).unfold(3, Q, step[1])  # [B, C, gh, gw, P, Q]
        x = copy(x.permute(0, 2, 3, 1, 4, 5))
        return x.view(B, x.shape[1] * x.shape[2], C * P * Q)
    if H % P or W % Q:
        raise ValueError(f"vit: patchify: images of {H} x {W} are not a multiple of the patch size {P} x {Q}")
    x = images.reshape(B, C, H // P, P, W // Q, Q)
    x = x.permute(0, 2, 4, 1, 3, 5)  # [B, H/P, W/Q, C, P, Q]
    return copy(x).view(B, (H // P) * (W // Q), C * P * Q)


def unpatchify(patches: Tensor, patch_size: int | tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for a grid of (rows, columns) patches: [B, N, C * P * Q] -> [B, C, H, W].

    Raises ValueError when the patches do not fill the grid.
    """
    P, Q = sides("patch_size", patch_size)
    B, N, K = patches.shape
    if grid[0] * grid[1] != N or K % (P * Q):
        raise ValueError(
            f"vit: unpatchify: {N} patches of {K} values do not fill a {grid[0]} x {grid[1]} grid of {P} x {Q} patches"
        )
    x = patches.reshape(B, *grid, -1, P, Q)  # [B, gh, gw, C, P, Q]
    x = x.permute(0, 3, 1, 4, 2, 5)  # [B, C, gh, P, gw, Q]
    return x.reshape(B, -1, grid[0] * P, grid[1] * Q)


def grid_of_positions(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the position embedding that belong to these arguments of a VisionTransformer.

    Pixels that fill no patch count as one, but not where they are not read (drop_edge), nor, as in timm, where images
    of any size are padded.
    """
    image, patch = (sides(key, settings[key]) for key in ("img_size", "patch_size"))
    stride = settings.get("patch_stride")
    steps = patch if stride is None else sides("patch_stride", stride)
    padded = settings.get("dynamic_img_size") and settings.get("dynamic_img_pad")
    rounded = math.floor if settings.get("drop_edge") or padded else math.ceil
    rows, columns = (rounded((i - p) / s) + 1 for i, p, s in zip(image, patch, steps, strict=True))
    return max(1, rows), max(1, columns)
