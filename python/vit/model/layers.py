"""The building stones that call the ops: norm, linear, patch embedding, drop-path.

Parameters are those of torch's modules, so names, initialisation and isinstance checks are the usual ones;
the arithmetic goes through `self.ops`, the bound ops of the model's plan. A module used on its own dispatches
per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import sides
from .planned import CallsOps

PATCH_LAYOUTS = ("conv", "linear")


class LayerNorm(CallsOps, nn.LayerNorm):
    """layer_norm over the last dimension; eps 1e-6 is what all published ViT weights were trained with."""

    def __init__(self, dim: int, eps: float = 1e-6, **factory: Any) -> None:
        super().__init__(dim, eps=eps, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)


class Linear(CallsOps, nn.Linear):
    """activation(x weight^T + bias) + residual in one op."""

    def forward(self, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias, activation, residual)


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, a sample's branch is dropped with probability `rate`
    and the kept ones are scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        # Not bernoulli_(), which asks MKL where it is there: a seed's float32 uniform numbers are the same everywhere.
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=torch.float32, device=x.device) < keep
        return x * kept.to(x.dtype).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class PatchEmbed(CallsOps, nn.Module):
    """Cuts an image into patches and projects each: [B, C, H, W] -> [B, N, dim].

    A convolution whose stride is its kernel size is one matrix product over the patches, and that is how it
    is computed. `layout` only says how the weight is kept: "conv" [dim, C, P, Q] as timm does, "linear" [dim,
    C * P * Q]; a state dict of either loads into both.

    Raises ValueError for an image side that is not a multiple of the patch, unless `dynamic_pad`: then the
    bottom and the right edge are padded with zeros.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        in_chans: int,
        dim: int,
        layout: str = "conv",
        dynamic_pad: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.dynamic_pad = dynamic_pad
        self.grid_size = self._grid(*img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.patch_values = in_chans * patch_size[0] * patch_size[1]
        self.proj: nn.Conv2d | nn.Linear
        if layout == "conv":
            self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, **factory)
        elif layout == "linear":
            self.proj = nn.Linear(self.patch_values, dim, **factory)
        else:
            raise ValueError(f"vit: patch_embed={layout!r} is not one of {', '.join(PATCH_LAYOUTS)}")

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        height, width = images.shape[-2:]
        pad_h, pad_w = -height % self.patch_size[0], -width % self.patch_size[1]
        if pad_h or pad_w:  # only with dynamic_pad: _check refuses the rest
            images = F.pad(images, (0, pad_w, 0, pad_h))
        patches = patchify(images, self.patch_size, self.ops.movement.contiguous)
        return self.ops.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        patch_h, patch_w = self.patch_size
        if (height % patch_h or width % patch_w) and not self.dynamic_pad:
            raise ValueError(
                f"vit: the image size {height} x {width} is no multiple of the patch size {patch_h} x {patch_w}; "
                "choose another img_size or patch_size, or dynamic_pad=True to pad the bottom and right edges"
            )
        if height < 1 or width < 1:  # of images; the model's own size has been checked
            raise ValueError(f"vit: the image size {height} x {width} is empty")
        return -(-height // patch_h), -(-width // patch_w)

    def _check(self, images: Tensor) -> None:
        height, width = self.img_size
        if images.ndim != 4:
            hint = "; add the batch dimension: images[None]" if images.ndim == 3 else ""
            raise ValueError(
                f"vit: images must be [B, {self.in_chans}, {height}, {width}], got {list(images.shape)}{hint}"
            )
        channels, *size = images.shape[1:]
        if channels != self.in_chans:
            last = "; the channels stand last: images.permute(0, 3, 1, 2)" if size[1] == self.in_chans else ""
            raise ValueError(f"vit: images have {channels} channels, the model takes {self.in_chans}{last}")
        if tuple(size) == self.img_size or (self.dynamic_pad and self._grid(*size) == self.grid_size):
            return
        raise ValueError(
            f"vit: images are {size[0]} x {size[1]}, the model takes {height} x {width}; resize them "
            "(model.preprocess does) or create the model with img_size=(height, width)"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Takes the projection's weight in either layout."""
        key, own = prefix + "proj.weight", self.proj.weight
        weight = state_dict.get(key)
        if weight is not None and {weight.ndim, own.ndim} == {2, 4} and weight.flatten(1).shape == own.flatten(1).shape:
            state_dict[key] = weight.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"img_size={self.img_size}, patch_size={self.patch_size}, grid_size={self.grid_size}"


def patchify(
    images: Tensor, patch_size: int | tuple[int, int], copy: Callable[[Tensor], Tensor] = Tensor.contiguous
) -> Tensor:
    """Images [B, C, H, W] -> patches [B, N, C * P * Q] in reading order, each patch in the order [C, P, Q].

    `copy` makes a view contiguous.
    Raises ValueError when H or W is not a multiple of the patch.
    """
    P, Q = sides("patch_size", patch_size)
    B, C, H, W = images.shape
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
