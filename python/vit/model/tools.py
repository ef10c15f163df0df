"""What timm's tools, and programs written for timm, ask of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

from torch import nn

from . import checks, init
from .decoder import DecoderHead
from .options import POOLS
from .pos_embed import FIXED, resample


class TimmTools:
    """Methods of a VisionTransformer with timm's names."""

    name: str
    preprocess: Any
    class_names: tuple[str, ...] | None
    pos_embed: Any
    attn_pool: Any
    blocks: Any
    head: Any
    num_classes: int
    embed_dim: int
    patch_embed: Any
    grad_checkpointing: bool
    #: The module that reads the image's channels.
    FIRST_CONV = "patch_embed.proj"
    #: The last layers.
    CLASSIFIER: str | tuple[str, ...] = "head"
    #: Whether there is one size of images unless told otherwise.
    FIXED_INPUT_SIZE = True

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The model's preprocessing in timm's form: what timm.data.resolve_model_data_config reads."""
        preprocess = self.preprocess
        return {
            "architecture": self.name,
            "num_classes": self.num_classes,
            "input_size": (preprocess.in_chans, *preprocess.img_size),
            "fixed_input_size": self.FIXED_INPUT_SIZE,
            "pool_size": None,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_pct,
            "crop_mode": preprocess.crop_mode,
            "mean": preprocess.mean,
            "std": preprocess.std,
            "first_conv": self.FIRST_CONV,
            "classifier": self.CLASSIFIER,
        }

    #: timm's older name of the same.
    default_cfg = pretrained_cfg

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for, of a module or of one that holds it."""
        raise NotImplementedError(
            f"vit: {self.name}: torch.jit.script compiles Python code, and this model chooses its kernels in Python; "
            "torch.jit.trace(model, images) and torch.export.export(model, (images,)) make a graph of it"
        )

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Where timm's feature extraction finds the blocks, how wide they are, and pixels per patch."""
        reduction = max(self.patch_embed.patch_size)
        return [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": reduction}
            for i in range(len(self.blocks))
        ]

    def get_classifier(self) -> Any:
        """The last linear layer; an Identity when num_classes is 0."""
        return self.head

    def reset_classifier(self: Any, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a newly initialised one; 0 removes it. The last norm keeps its place."""
        if global_pool is not None:
            checks.choice(global_pool=(global_pool, POOLS))
            checks.pooling(global_pool, self.cls_token is not None)
            if global_pool == "map" and self.attn_pool is None:
                raise ValueError(
                    'vit: global_pool="map" needs the pooling layer that a model has when it is created with it'
                )
            if global_pool != "map":
                self.attn_pool = None
            self.global_pool = global_pool
        checks.classes(num_classes)
        self.num_classes = num_classes
        self.class_names = None  # they were those of the old head
        self.head = self._new_head("head")
        self.replan()

    def _new_head(self: Any, name: str) -> nn.Module:
        """A newly initialised head for num_classes, or an Identity."""
        head = self._make_head(device=self.device, dtype=self.dtype)
        draws = init.Draws()
        for path, module in head.named_modules(prefix=name):
            init.init_module(module, path, self.weight_init, self.num_classes, draws)
        return head.train(self.training)

    def _make_head(self: Any, **factory: Any) -> nn.Module:
        """A linear layer, or one behind a decoder, without values; an Identity where there are no classes."""
        if not self.num_classes:
            return nn.Identity()
        if self.options.decoder:
            options = replace(self.options, num_classes=self.num_classes)
            return DecoderHead(options, self.patch_embed.grid_size, **factory)
        return nn.Linear(self.head_hidden_size, self.num_classes, **factory)

    def set_input_size(self: Any, img_size: Any = None, patch_size: Any = None) -> None:
        """Takes images or patches of another size from now on: positions and patch projection are resampled.

        Raises ValueError for sizes that do not fit together.
        """
        embed, old = self.patch_embed, self.patch_embed.grid_size
        if patch_size is not None and img_size is not None:
            img_size, patch_size = checks.sides("img_size", img_size), checks.sides("patch_size", patch_size)
            before = embed.img_size
            embed.img_size = img_size  # the new patch is checked against the new size
            try:
                embed.set_patch_size(patch_size)
            except ValueError:
                embed.img_size = before
                raise
        elif patch_size is not None:
            embed.set_patch_size(checks.sides("patch_size", patch_size))
        if img_size is not None:
            embed.set_image_size(checks.sides("img_size", img_size))
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        if embed.grid_size != old and isinstance(self.pos_embed, nn.Parameter):
            table = resample(self.pos_embed.detach(), embed.grid_size, old, prefix, self.options.pos_resize)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        elif embed.grid_size != old and self.pos_embed is not None:
            fixed = FIXED[self.options.pos_embed](embed.grid_size, self.embed_dim, prefix)
            self.pos_embed = fixed.to(self.pos_embed)
        if isinstance(self.head, DecoderHead):
            self.head.grid = embed.grid_size
        self.preprocess = type(self.preprocess)(**self.preprocess.to_dict() | {"img_size": embed.img_size})
        self.replan()

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone."""
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into a stem and the blocks, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        self.grad_checkpointing = enable
