"""Position embeddings: the fixed sine tables and the resampling of learned ones to another grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos2d(grid: tuple[int, int], dim: int, prefix_tokens: int = 0, temperature: float = 10000.0) -> Tensor:
    """The fixed table of "Better plain ViT baselines" (arXiv:2205.01580): [1, prefix_tokens + gh * gw, dim]
    float32.

    With f_k = temperature^(-k / (dim/4 - 1)) for k = 0 .. dim/4 - 1, the row of the patch at (y, x) is
    [sin(x f), cos(x f), sin(y f), cos(y f)]. Prefix tokens (the class token) have no place in the image:
    zeros.

    Raises ValueError unless dim is a multiple of 4 and at least 8.
    """
    if dim % 4 or dim < 8:
        raise ValueError(f"vit: pos_embed='sincos2d' needs embed_dim to be a multiple of 4 and at least 8, got {dim}")
    height, width = grid
    quarter = dim // 4
    # float64: 10000 ** -1 of a position near 100 loses the last digits in float32.
    frequency = temperature ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / (quarter - 1))
    y = torch.arange(height, dtype=torch.float64, device="cpu")[:, None] * frequency  # [gh, dim/4]
    x = torch.arange(width, dtype=torch.float64, device="cpu")[:, None] * frequency  # [gw, dim/4]
    y = y[:, None, :].expand(height, width, quarter)
    x = x[None, :, :].expand(height, width, quarter)
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).reshape(1, height * width, dim)
    return F.pad(table, (0, 0, prefix_tokens, 0)).float()


def sincos1d(grid: tuple[int, int], dim: int, prefix_tokens: int = 0, temperature: float = 10000.0) -> Tensor:
    """The fixed table of "Attention Is All You Need" (arXiv:1706.03762), over the patches in reading order:
    [1, prefix_tokens + gh * gw, dim] float32.

    With f_k = temperature^(-2 k / dim) for k = 0 .. dim/2 - 1, the row of patch n has sin(n f_k) at 2 k and cos(n f_k)
    at 2 k + 1. Prefix tokens have no place in the image: zeros.

    Raises ValueError for an odd dim.
    """
    if dim % 2:
        raise ValueError(f"vit: pos_embed='sincos1d' needs an even embed_dim, got {dim}")
    frequency = temperature ** (-2 * torch.arange(dim // 2, dtype=torch.float64, device="cpu") / dim)
    place = torch.arange(grid[0] * grid[1], dtype=torch.float64, device="cpu")[:, None] * frequency  # [N, dim/2]
    table = torch.stack([place.sin(), place.cos()], dim=-1).reshape(1, -1, dim)
    return F.pad(table, (0, 0, prefix_tokens, 0)).float()


#: pos_embed -> the table that it stands for, by grid, width and number of prefix tokens.
FIXED = {"sincos1d": sincos1d, "sincos2d": sincos2d}


def resample(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int] | None = None,
    prefix_tokens: int = 1,
    rule: str | None = None,
) -> Tensor:
    """Learned position embeddings [1, prefix_tokens + h * w, C] for another patch grid, by default bicubic with
    antialiasing.

    `old_grid` None means a square one. Prefix rows are kept. Computed in float32, returned in the given
    dtype: the same values as timm. `rule`: another interpolation, one of options.RESIZES.

    Raises ValueError when the rows do not make up `old_grid` (or a square).
    """
    rows = pos_embed.shape[1] - prefix_tokens
    if old_grid is None:
        side = int(max(rows, 0) ** 0.5 + 0.5)
        old_grid = (side, side)
    if old_grid[0] * old_grid[1] != rows or rows < 1:
        raise ValueError(
            f"vit: a position embedding of {pos_embed.shape[1]} rows with {prefix_tokens} prefix token(s) is not a "
            f"{old_grid[0]} x {old_grid[1]} grid; pass the grid it was trained with"
        )
    if old_grid == new_grid:
        return pos_embed
    prefix, table = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    image = table.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # [1, C, h, w]
    image = resize(image, new_grid, rule)
    table = image.permute(0, 2, 3, 1).reshape(1, new_grid[0] * new_grid[1], -1)
    return torch.cat([prefix, table.to(pos_embed.dtype)], dim=1)


def resample_patches(weight: Tensor, patch_size: tuple[int, int], rule: str | None = None) -> Tensor:
    """A patch projection [dim, C, P, Q] for patches of another size (FlexiViT, arXiv:2212.08013, section 3.4).

    With B the matrix that resizes a patch from the old size to the new, each kernel w becomes pinv(B)^T w: its product
    with a resized patch is, as nearly as can be, that of the old kernel with the patch. Computed in float32, returned
    in the given dtype: the same values as timm.
    """
    old = tuple(weight.shape[-2:])
    if old == tuple(patch_size):
        return weight
    units = torch.eye(old[0] * old[1], dtype=torch.float32, device=weight.device).view(-1, 1, *old)
    resized = resize(units, patch_size, rule).flatten(1)  # B^T: [old pixels, new pixels]
    kernels = weight.float().flatten(2) @ torch.linalg.pinv(resized).t()
    return kernels.unflatten(2, patch_size).to(weight.dtype)


def resize(image: Tensor, size: tuple[int, int], rule: str | None) -> Tensor:
    """A picture [B, C, h, w] by one of options.RESIZES; None: timm's, bicubic with antialiasing."""
    mode, _, more = (rule or "bicubic-aa").partition("-")
    if more == "corners":
        return F.interpolate(image, size=size, mode=mode, align_corners=True)
    return F.interpolate(image, size=size, mode=mode, antialias=more == "aa")
