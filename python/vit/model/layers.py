"""The layers that torch.nn does not have: patch embedding, layer scale, quick GELU, and what drops at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .patches import patchify
from .planned import CallsOps
from .pos_embed import resample_patches
from .torch_layers import call, is_patch_projection, know, plain, untouched

PATCH_LAYOUTS = ("conv", "linear")


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, a sample's branch is dropped with probability `drop_prob`
    and the kept ones are scaled by 1 / (1 - drop_prob)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """lengths: x is [1, N, C], the tokens of several images, so many of each, and each is dropped or kept."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        if lengths is not None:
            kept = torch.rand(len(lengths), dtype=torch.float32, device=x.device) < keep
            rows = torch.cat([kept[i].expand(n) for i, n in enumerate(lengths)])
            return x * rows[None, :, None].to(x.dtype).div_(keep)
        # Not bernoulli_(), which asks MKL where it is there: a seed's float32 uniform numbers are the same everywhere.
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=torch.float32, device=x.device) < keep
        return x * kept.to(x.dtype).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


class LayerScale(nn.Module):
    """x * gamma, one factor for each channel (arXiv:2103.17239): [..., C] -> [..., C]."""

    def __init__(self, dim: int, init_values: float, **factory: Any) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma

    def extra_repr(self) -> str:
        return f"init_values={self.init_values:g}"


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class PatchDropout(nn.Module):
    """In training, a random part of each image's patches is left out (arXiv:2212.00794): [B, N, C] -> [B, N', C].

    Of n patches max(1, int(n * (1 - prob))) are kept, in random order; the first `num_prefix_tokens` tokens all are.
    """

    def __init__(self, prob: float, num_prefix_tokens: int) -> None:
        super().__init__()
        self.prob = prob
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        return x if not self.training or self.prob == 0.0 else self.pick(x, self.kept(x))

    def kept(self, x: Tensor) -> Tensor:
        """Indices of the patches that are kept [B, N'], drawn anew."""
        count = x.shape[1] - self.num_prefix_tokens
        # Uniform float32 numbers: a seed's are the same on every processor (see DropPath).
        order = torch.rand(x.shape[0], count, dtype=torch.float32, device=x.device).argsort(dim=1)
        return order[:, : max(1, int(count * (1.0 - self.prob)))]

    def pick(self, x: Tensor, kept: Tensor) -> Tensor:
        """The prefix tokens and those patches."""
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return torch.cat([prefix, patches.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))], dim=1)

    def extra_repr(self) -> str:
        return f"prob={self.prob:g}, num_prefix_tokens={self.num_prefix_tokens}"


class PatchEmbed(CallsOps, nn.Module):
    """Cuts an image into patches and projects each: [B, C, H, W] -> [B, N, dim].

    A convolution whose stride is its kernel size is one matrix product over the patches, and that is how it
    is computed. `layout` only says how the weight is kept: "conv" [dim, C, P, Q] as timm does, "linear" [dim,
    C * P * Q]; a state dict of either loads into both.

    `stride`: pixels from one patch to the next, by default the patch's side; with a smaller one patches overlap, and
    their grid has (side - patch) // stride + 1 rows or columns.

    Raises ValueError for an image side that patches do not fill, unless `dynamic_pad`: then the bottom and the right
    edge are padded with zeros; or `drop_edge`: then pixels beyond the last whole patch are not read. `dynamic_size`
    takes images of any such size, and returns [B, grid height, grid width, dim] as timm does.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        in_chans: int,
        dim: int,
        layout: str = "conv",
        dynamic_pad: bool = False,
        *,
        dynamic_size: bool = False,
        drop_edge: bool = False,
        stride: tuple[int, int] | None = None,
        bias: bool = True,
        norm: nn.Module | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.dynamic_img_pad = dynamic_pad
        self.dynamic_img_size = dynamic_size
        self.drop_edge = drop_edge
        if layout not in PATCH_LAYOUTS:
            raise ValueError(f"vit: patch_embed={layout!r} is not one of {', '.join(PATCH_LAYOUTS)}")
        self.layout = layout
        self.patch_size = patch_size
        self.stride = stride or patch_size
        self.set_image_size(img_size)
        self.proj = self._projection(dim, bias, **factory)
        self.norm = nn.Identity() if norm is None else norm

    def _projection(self, dim: int, bias: bool, **factory: Any) -> nn.Conv2d | nn.Linear:
        if self.layout == "linear":
            return nn.Linear(self.patch_values, dim, bias, **factory)
        size, stride = self.patch_size, self.stride
        return nn.Conv2d(self.in_chans, dim, kernel_size=size, stride=stride, bias=bias, **factory)

    @property
    def dynamic_pad(self) -> bool:
        """An older name of dynamic_img_pad."""
        return self.dynamic_img_pad

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: what the projection reads."""
        return self.in_chans * self.patch_size[0] * self.patch_size[1]

    def set_image_size(self, img_size: tuple[int, int]) -> None:
        """Takes images of another size from now on."""
        grid = self._grid(*img_size)
        if self.dynamic_img_size and self.dynamic_img_pad:
            # timm's positions are those of whole patches, and are resampled to the grid of each padded image.
            sizes = zip(img_size, self.patch_size, self.stride, strict=True)
            rows, columns = (max(1, (side - patch) // step + 1) for side, patch, step in sizes)
            grid = rows, columns
        self.img_size, self.grid_size, self.num_patches = img_size, grid, grid[0] * grid[1]

    @torch.no_grad()
    def set_patch_size(self, patch_size: tuple[int, int]) -> None:
        """Cuts patches of another size from now on; the projection is resampled to them.

        Raises ValueError where they overlap.
        """
        if self.stride != self.patch_size and patch_size != self.patch_size:
            raise ValueError(f"vit: patches {self.stride} pixels apart stay {self.patch_size}; create the model anew")
        old, size, made = self.proj, self.patch_size, (self.img_size, self.grid_size, self.num_patches)
        apart = self.stride
        self.patch_size, self.stride = patch_size, patch_size if apart == size else apart
        try:
            self.set_image_size(self.img_size)
        except ValueError:
            self.patch_size, self.stride = size, apart
            self.img_size, self.grid_size, self.num_patches = made
            raise
        weight = old.weight.reshape(len(old.weight), self.in_chans, *size)
        new = self._projection(len(weight), old.bias is not None, device=weight.device, dtype=weight.dtype)
        new.weight.copy_(resample_patches(weight, patch_size).reshape(new.weight.shape))
        new.weight.requires_grad_(old.weight.requires_grad)
        if old.bias is not None:
            new.bias = old.bias
        self.proj = new.train(old.training)

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(images, Tensor):  # a tracer's stand-in has no sizes to look at
            self._check(images)
            height, width = images.shape[-2:]
            (patch_h, patch_w), (step_h, step_w) = self.patch_size, self.stride
            pad_h = patch_h - height if height < patch_h else (patch_h - height) % step_h
            pad_w = patch_w - width if width < patch_w else (patch_w - width) % step_w
            if (pad_h or pad_w) and self.dynamic_img_pad:
                images = F.pad(images, (0, pad_w, 0, pad_h))
            elif pad_h or pad_w:  # drop_edge: _check refuses the rest
                high, wide = (height - patch_h) // step_h * step_h, (width - patch_w) // step_w * step_w
                images = images[..., : high + patch_h, : wide + patch_w]
        patches = self._project(images)
        if self.dynamic_img_size:
            # reshape: the batch that is traced would be a constant of unflatten in an ONNX file.
            patches = patches.reshape(patches.shape[0], *self.grid_of(images), patches.shape[2])
        return call(self.ops, self.norm, patches)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of these images."""
        return self._grid(*images.shape[-2:]) if self.dynamic_img_size else self.grid_size

    def filters(self) -> Tensor:
        """The projection's weight as filters [dim, C, P, Q]."""
        return self.proj.weight.reshape(-1, self.in_chans, *self.patch_size)

    def _project(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, dim], the projection called as timm calls it unless nobody would notice."""
        ops, proj = self.ops, self.proj
        if self.layout == "linear":
            return call(ops, proj, patchify(images, self.patch_size, ops.movement.contiguous, self.stride))
        if isinstance(images, Tensor) and untouched(proj, nn.Conv2d) and self.cuts_patches(proj):
            weight, bias = proj.weight, proj.bias
            if plain((images, weight, bias)):
                patches = patchify(images, self.patch_size, ops.movement.contiguous, self.stride)
                return ops.linear(patches, weight.flatten(1), bias)
        return call(ops, proj, images).flatten(2).transpose(1, 2)

    def cuts_patches(self, proj: Any) -> bool:
        """Whether a convolution is the product with this module's patches."""
        arguments = proj.stride, proj.padding, proj.dilation, proj.groups
        return is_patch_projection(proj.kernel_size, *arguments, self.stride) and proj.kernel_size == self.patch_size

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        (patch_h, patch_w), (step_h, step_w) = self.patch_size, self.stride
        if height < 1 or width < 1:  # of images; the model's own size has been checked
            raise ValueError(f"vit: the image size {height} x {width} is empty")
        if self.dynamic_img_pad:
            return max(0, -(-(height - patch_h) // step_h)) + 1, max(0, -(-(width - patch_w) // step_w)) + 1
        whole = height >= patch_h and width >= patch_w
        fits = whole and not ((height - patch_h) % step_h or (width - patch_w) % step_w)
        if not fits and not (self.drop_edge and whole):
            what = f"is no multiple of the patch size {patch_h} x {patch_w}"
            if self.stride != self.patch_size:
                what = f"is not filled by patches of {patch_h} x {patch_w}, {step_h} x {step_w} apart"
            raise ValueError(
                f"vit: the image size {height} x {width} {what}; "
                "choose another img_size or patch_size, or dynamic_img_pad=True (dynamic_pad=True) to pad the bottom "
                "and right edges"
            )
        return (height - patch_h) // step_h + 1, (width - patch_w) // step_w + 1

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
        if tuple(size) == self.img_size:
            return
        if self.dynamic_img_size:
            self._grid(*size)  # refuses what cannot be cut
            return
        if self.dynamic_img_pad and self._grid(*size) == self.grid_size:
            return
        raise ValueError(
            f"vit: images are {size[0]} x {size[1]}, the model takes {height} x {width}; resize them "
            "(model.preprocess does) or create the model with img_size=(height, width), or dynamic_img_size=True"
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


know(PatchEmbed, QuickGELU, LayerScale)
