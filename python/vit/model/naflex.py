"""NaFlexViT (arXiv:2502.14786, section 2.4; timm's naflexvit.py): a Vision Transformer for images of any size, whose
one grid of positions is interpolated to each, and whose patches are projected by a linear layer.

    tokens = [registers; patches W + b + positions of the image's grid]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, init
from .layers import PatchDropout
from .naflex_batch import images_of
from .options import RESIZES, Options, defaults_of, signature_of
from .parts import make_embed_norm, make_norm
from .planned import CallsOps
from .pos_embed import resize
from .torch_layers import call, know
from .vision_transformer import PLACE, VisionTransformer


@dataclass(frozen=True)
class NaFlexOptions(Options):
    """Sizes, parts and rates of a NaFlexVit; vit.model.NaFlexVit says what each means."""

    class_token: bool = False
    global_pool: str = "map"
    no_embed_class: bool = True
    pos_embed_grid_size: Any = (16, 16)
    pos_embed_ar_preserving: bool = False
    pos_embed_interp_mode: str = "bicubic"
    pos_embed_antialias: bool = True
    pos_embed_align_corners: bool = False
    max_num_patches: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.absent("NaFlexVit", patch_stride=self.patch_stride, representation_size=self.representation_size)
        if self.decoder:
            raise ValueError("vit: a NaFlexVit has a grid for each image, so that no decoder goes with it")
        checks.sides("pos_embed_grid_size", self.pos_embed_grid_size)
        checks.choice(pos_embed=(self.pos_embed, ("learned", "none")))
        if self.max_num_patches is not None:
            checks.positive(max_num_patches=self.max_num_patches)
        if self.resize_rule not in RESIZES:
            raise ValueError(
                f"vit: pos_embed_interp_mode={self.pos_embed_interp_mode!r}, pos_embed_antialias="
                f"{self.pos_embed_antialias} and pos_embed_align_corners={self.pos_embed_align_corners} are none of "
                f"pos_resize={', '.join(RESIZES)}"
            )
        if not self.no_embed_class:
            raise ValueError("vit: a NaFlexVit has positions of patches only: no_embed_class must be True")

    @property
    def norm_after_pool(self) -> bool:
        """Whether the last norm comes after the pooling."""
        return self.global_pool == "avg" if self.fc_norm is None else self.fc_norm

    @property
    def resize_rule(self) -> str:
        """How positions get another grid: pos_resize, or what timm's three arguments say."""
        corners, antialiased = self.pos_embed_align_corners, self.pos_embed_antialias
        return self.pos_resize or self.pos_embed_interp_mode + "-corners" * corners + "-aa" * antialiased


class NaFlexEmbeds(CallsOps, nn.Module):
    """Images [B, in_chans, height, width] -> tokens [B, prefix + N, C] and the grid of patches (rows, columns).

    A patch is read in the order [P, P, in_chans]. pos_embed [1, rows, columns, C] belongs to patches only.
    """

    dynamic_img_size = True

    def __init__(self, options: NaFlexOptions, **factory: Any) -> None:
        super().__init__()
        o, width = options, options.embed_dim

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(1, *sizes, width, **factory))

        self.patch_size, self.in_chans = checks.sides("patch_size", o.patch_size), o.in_chans
        self.dynamic_img_pad, self.rule, self.keeps_aspect = o.dynamic_img_pad, o.resize_rule, o.pos_embed_ar_preserving
        self.max_num_patches = o.max_num_patches
        self.cls_token = parameter(1) if o.class_token else None
        self.reg_token = parameter(o.reg_tokens) if o.reg_tokens else None
        self.proj = nn.Linear(self.patch_values, width, bias=not o.pre_norm, **factory)
        self.norm = make_embed_norm(o, **factory)
        grid = checks.sides("pos_embed_grid_size", o.pos_embed_grid_size)
        self.pos_embed = parameter(*grid) if o.pos_embed == "learned" else None
        self.pos_drop = nn.Dropout(o.pos_drop_rate)
        self.set_image_size(checks.sides("img_size", o.img_size))

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return self.in_chans * self.patch_size[0] * self.patch_size[1]

    def set_image_size(self, img_size: tuple[int, int]) -> None:
        """What images have unless they come in another size."""
        self.img_size, self.grid_size = img_size, self._grid(*img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of these images; ValueError above max_num_patches."""
        rows, columns = self._grid(*images.shape[-2:])
        if self.max_num_patches is not None and rows * columns > self.max_num_patches:
            (height, width), (high, wide) = images.shape[-2:], self.patch_size
            raise ValueError(
                f"vit: an image of {height} x {width} has {rows * columns} patches of {high} x {wide}, above "
                f"max_num_patches={self.max_num_patches}; model.preprocess makes images of at most that many"
            )
        return rows, columns

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        ops = self.ops
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"vit: images must be [B, {self.in_chans}, height, width], got {list(images.shape)}")
        (rows, columns), (high, wide) = grid, patch = self.grid_of(images), self.patch_size
        missing = rows * high - images.shape[2], columns * wide - images.shape[3]
        if any(missing):
            images = F.pad(images, (0, missing[1], 0, missing[0]))
        batch = images.shape[0]  # len() would be a constant in an exported program
        cut = images.reshape(batch, self.in_chans, rows, patch[0], columns, patch[1]).permute(0, 2, 4, 3, 5, 1)
        patches = ops.movement.contiguous(cut).view(batch, rows * columns, self.patch_values)
        tokens = call(ops, self.norm, call(ops, self.proj, patches))
        tokens = ops.movement.tokens(tokens, None, self.positions(grid))
        return call(ops, self.pos_drop, ops.movement.tokens(tokens, self._prefix(), None)), grid

    def filters(self) -> Tensor:
        """The projection's weight as filters [dim, in_chans, P, P]."""
        return self.proj.weight.reshape(-1, *self.patch_size, self.in_chans).permute(0, 3, 1, 2)

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """The positions of a grid [1, N, C]; keeps_aspect: of a square as long as its longer side, cut at the right and
        the bottom."""
        table = self.pos_embed
        if table is None or tuple(table.shape[1:3]) == grid:
            return None if table is None else table.flatten(1, 2)
        size = (max(grid), max(grid)) if self.keeps_aspect else grid
        image = resize(table.permute(0, 3, 1, 2).float(), size, self.rule)[:, :, : grid[0], : grid[1]]
        return image.flatten(2).transpose(1, 2).to(table.dtype)

    def _prefix(self) -> Tensor | None:
        given: list[Tensor] = [t for t in (self.cls_token, self.reg_token) if t is not None]
        return torch.cat(given, dim=1) if len(given) > 1 else given[0] if given else None

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        high, wide = self.patch_size
        if height < 1 or width < 1 or ((height % high or width % wide) and not self.dynamic_img_pad):
            raise ValueError(
                f"vit: the image size {height} x {width} is no multiple of the patch size {high} x {wide}; "
                "choose another size, or dynamic_img_pad=True to pad the bottom and right edges"
            )
        return -(-height // high), -(-width // wide)

    def extra_repr(self) -> str:
        return f"img_size={self.img_size}, patch_size={self.patch_size}"


class NaFlexVit(VisionTransformer):
    """images [B, in_chans, height, width] of any size that can be cut into patches, a list of images of several sizes,
    or a batch of timm's NaFlexCollator (a dict of patches, patch_coord, patch_valid) -> logits [B, num_classes].

    The arguments of VisionTransformer, and pos_embed_grid_size, the grid of the learned positions, and
    pos_embed_ar_preserving: they are interpolated to a square and cut, which keeps their aspect; pos_embed_interp_mode,
    pos_embed_antialias, pos_embed_align_corners: how, unless pos_resize says it. img_size is what is planned for and
    what model.preprocess makes. max_num_patches: images of more are refused, and model.preprocess keeps the aspect of
    images and makes them as large as that allows. Patches of a batch that are not valid are left out; what has tokens
    of images is then a list, as for a list of images.
    """

    Options = NaFlexOptions
    ARGUMENTS = defaults_of(NaFlexOptions)
    FIRST_CONV = "embeds.proj"
    FIXED_INPUT_SIZE = False
    options: NaFlexOptions
    NO_MASKS = {"attn_mask": None}  # noqa: RUF012

    def _build_patches(self, factory: dict[str, Any]) -> None:
        self.embeds = NaFlexEmbeds(self.options, **factory)

    def _build_embedding(self, home: Tensor, factory: dict[str, Any]) -> None:
        o = self.options
        self.norm_pre = make_norm(o.norm_layer, o.embed_dim, o.norm_eps, **factory) if o.pre_norm else nn.Identity()
        dropped = o.patch_drop_rate
        self.patch_drop = PatchDropout(dropped, self.num_prefix_tokens) if dropped else None  # type: ignore[assignment]

    # ---- batches of timm's collator ----

    def forward(self, images: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(self._images(images), attn_mask, is_causal)

    def forward_features(self, images: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """Tokens after the last norm; see VisionTransformer."""
        return super().forward_features(self._images(images), attn_mask, is_causal)

    def forward_intermediates(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Tokens after the last norm and after each wanted block; see VisionTransformer."""
        return super().forward_intermediates(self._images(images), *args, **kwargs)

    def _images(self, images: Any) -> Any:
        return images_of(images, self.embeds) if isinstance(images, Mapping) else images

    # ---- parts ----

    @property
    def patch_embed(self) -> Any:
        """Where images become patches."""
        return self.embeds

    @property
    def cls_token(self) -> Any:  # type: ignore[override]
        """The class token [1, 1, C] or None."""
        return self.embeds.cls_token

    @property
    def reg_token(self) -> Any:  # type: ignore[override]
        """The registers [1, R, C] or None."""
        return self.embeds.reg_token

    @property
    def pos_embed(self) -> Any:  # type: ignore[override]
        """The positions [1, rows, columns, C] or None."""
        return self.embeds.pos_embed

    def embed(self, images: Tensor) -> Tensor:
        """images [B, in_chans, height, width] -> tokens [B, N, C] as the first block takes them."""
        tokens, _ = self.embeds(images)
        if self.patch_drop is not None:
            tokens = call(self.ops, self.patch_drop, tokens)
        return call(self.ops, self.norm_pre, tokens)

    def _init_weights(self) -> None:
        super()._init_weights()
        if self.options.weight_init != "skip":
            draws = init.Draws()
            for name, std in (("pos_embed", 0.02), ("cls_token", 1e-6), ("reg_token", 1e-6)):
                if (token := getattr(self.embeds, name)) is not None:
                    with torch.no_grad():
                        draws.normal(token, f"embeds.{name}", std)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Plans for images of another size; those of any size are taken before and after."""
        if patch_size is not None:
            raise ValueError("vit: a NaFlexVit keeps the patch size it was made with")
        if img_size is not None:
            self.embeds.set_image_size(checks.sides("img_size", img_size))
            self.preprocess = type(self.preprocess)(**self.preprocess.to_dict() | {"img_size": self.embeds.img_size})
            self.replan()

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone."""
        return {"embeds.pos_embed", "embeds.cls_token", "embeds.reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into a stem and the blocks, for layer-wise learning rates."""
        return {"stem": r"^embeds", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


NaFlexVit.__signature__ = signature_of(PLACE, NaFlexOptions)  # type: ignore[attr-defined]
know(NaFlexEmbeds, NaFlexVit)
