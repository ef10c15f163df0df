"""The layers that torch.nn does not have: patch embedding and drop-path."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .patches import patchify
from .planned import CallsOps
from .torch_layers import call, is_patch_projection, know, plain, untouched

PATCH_LAYOUTS = ("conv", "linear")


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, a sample's branch is dropped with probability `drop_prob`
    and the kept ones are scaled by 1 / (1 - drop_prob)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        # Not bernoulli_(), which asks MKL where it is there: a seed's float32 uniform numbers are the same everywhere.
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=torch.float32, device=x.device) < keep
        return x * kept.to(x.dtype).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


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
        self.layout = layout
        self.norm = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(images, Tensor):  # a tracer's stand-in has no sizes to look at
            self._check(images)
            height, width = images.shape[-2:]
            pad_h, pad_w = -height % self.patch_size[0], -width % self.patch_size[1]
            if pad_h or pad_w:  # only with dynamic_pad: _check refuses the rest
                images = F.pad(images, (0, pad_w, 0, pad_h))
        return call(self.ops, self.norm, self._project(images))

    def _project(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, dim], the projection called as timm calls it unless nobody would notice."""
        ops, proj = self.ops, self.proj
        if self.layout == "linear":
            return call(ops, proj, patchify(images, self.patch_size, ops.movement.contiguous))
        if isinstance(images, Tensor) and untouched(proj, nn.Conv2d) and self.cuts_patches(proj):
            weight, bias = proj.weight, proj.bias
            if plain((images, weight, bias)):
                return ops.linear(patchify(images, self.patch_size, ops.movement.contiguous), weight.flatten(1), bias)
        return call(ops, proj, images).flatten(2).transpose(1, 2)

    def cuts_patches(self, proj: Any) -> bool:
        """Whether a convolution is the product with this module's patches."""
        arguments = proj.stride, proj.padding, proj.dilation, proj.groups
        return is_patch_projection(proj.kernel_size, *arguments) and proj.kernel_size == self.patch_size

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
        key, own = prefix + "proj.weight", getattr(self.proj, "weight", None)
        weight = state_dict.get(key)
        if (
            weight is not None
            and isinstance(own, Tensor)
            and {weight.ndim, own.ndim} == {2, 4}
            and weight.flatten(1).shape == own.flatten(1).shape
        ):
            state_dict[key] = weight.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"img_size={self.img_size}, patch_size={self.patch_size}, grid_size={self.grid_size}"


know(PatchEmbed)
