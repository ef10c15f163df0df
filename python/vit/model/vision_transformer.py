"""The Vision Transformer (arXiv:2010.11929), pre-norm, with timm's parameter names.

    tokens = [class; patches W + b] + position
    tokens = tokens + attention(norm1(tokens))        for each block
    tokens = tokens + mlp(norm2(tokens))
    logits = head(norm(tokens)[class])

Letters: B batch, N tokens, C embed_dim, H heads, D = C / H head dimension. Nothing here knows a backend: the
modules call `self.ops`, which the model's plan binds once, and again when the model changes device, dtype or
mode. Modules and their names are timm's; what a hook, a wrapper or a replaced module sees is timm's too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import Spec
from ..preprocess import Preprocess
from . import checks, init
from .blocks import Block
from .layers import PatchEmbed
from .planned import CallsOps, Planned
from .pos_embed import sincos2d
from .specs import APPROXIMATE, specs_of
from .torch_layers import call, know, untouched

POOLS = ("token", "avg", "")
POSITIONS = ("learned", "sincos2d", "none")


class VisionTransformer(CallsOps, Planned):
    """images [B, in_chans, height, width] -> logits [B, num_classes].

    Sizes: img_size and patch_size are one side or (height, width); img_size must be a multiple of patch_size
    unless dynamic_pad. embed_dim must be a multiple of num_heads; the MLP is int(embed_dim * mlp_ratio) wide.

    Options: global_pool "token" reads the class token, "avg" the mean of the patch tokens, "" returns all tokens.
    fc_norm: whether the last norm comes after the pooling; None: where that is "avg". pos_embed "learned", "sincos2d"
    (fixed) or "none". patch_embed "conv" or "linear": how the projection's weight is kept. act_layer "gelu" (erf)
    or "gelu_tanh". weight_init: see vit.model.init.

    Regularisation, in training mode only: drop_rate before the head, pos_drop_rate after the position
    embedding, proj_drop_rate after each projection and in the MLP, attn_drop_rate on attention probabilities
    (which only the reference backend has), drop_path_rate rising linearly to the last block.

    backend, training, name: see vit.create. Raises ValueError for sizes that do not fit together,
    BackendError when a named backend cannot run the model.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        class_token: bool = True,
        global_pool: str = "token",
        fc_norm: bool | None = None,
        pos_embed: str = "learned",
        patch_embed: str = "conv",
        dynamic_pad: bool = False,
        act_layer: str = "gelu",
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        *,
        backend: str = "auto",
        training: bool = True,
        name: str = "vit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.choice(global_pool=(global_pool, POOLS), pos_embed=(pos_embed, POSITIONS))
        checks.choice(act_layer=(act_layer, tuple(APPROXIMATE)), weight_init=(weight_init, init.SCHEMES))
        checks.positive(in_chans=in_chans, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        checks.number(0.0, norm_eps=norm_eps)
        checks.rate(drop_rate=drop_rate, pos_drop_rate=pos_drop_rate, proj_drop_rate=proj_drop_rate)
        checks.rate(attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        checks.classes(num_classes)
        checks.pooling(global_pool, class_token, fc_norm)

        self.name, self.backend = name, backend
        self.num_classes = num_classes
        self.embed_dim = self.num_features = embed_dim
        self.num_heads = num_heads
        self.mlp_hidden = checks.mlp_width(embed_dim, num_heads, mlp_ratio)
        self.act_layer = act_layer
        self.attn_drop_rate = attn_drop_rate
        self.global_pool = global_pool
        # Averaging comes before the norm unless told otherwise, as in timm; the name of its parameters says which.
        self.norm_after_pool = global_pool == "avg" if fc_norm is None else fc_norm
        self.num_prefix_tokens = int(class_token)
        self.weight_init = weight_init
        self.grad_checkpointing = False

        home = torch.empty(0, device=device, dtype=dtype)  # what None stands for
        # Parameters get room once all are known, and their values by init_weights or with the weights that are loaded.
        factory: dict[str, Any] = {"device": "meta", "dtype": home.dtype}
        image, patch = checks.sides("img_size", img_size), checks.sides("patch_size", patch_size)
        self.patch_embed = PatchEmbed(image, patch, in_chans, embed_dim, patch_embed, dynamic_pad, **factory)
        # Now, so that a refusal comes before the large part is built.
        self._plan = self.plan_for(home.device, home.dtype, training)
        self._build_embedding(class_token, pos_embed, pos_drop_rate, home)
        options = {"proj_drop": proj_drop_rate, "attn_drop": attn_drop_rate, "norm_eps": norm_eps, **factory}
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        sizes = (embed_dim, num_heads, mlp_ratio, qkv_bias)
        self.blocks = nn.Sequential(*[Block(*sizes, drop_path=p, activation=act_layer, **options) for p in rates])
        after = self.norm_after_pool
        self.norm = nn.Identity() if after else nn.LayerNorm(embed_dim, norm_eps, **factory)
        self.fc_norm = nn.LayerNorm(embed_dim, norm_eps, **factory) if after else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **factory) if num_classes else nn.Identity()
        _take_room(self, home.device)
        init.init_weights(self, weight_init, num_classes)

        self.class_names: tuple[str, ...] | None = None
        self.preprocess = Preprocess(self.patch_embed.img_size, in_chans=in_chans)
        self.bind(self._plan)
        self.train(training)

    def _build_embedding(self, class_token: bool, pos_embed: str, dropout: float, home: Tensor) -> None:
        """What stands between the patches and the first block, in the order of timm's modules."""
        width, prefix = self.embed_dim, self.num_prefix_tokens
        factory: dict[str, Any] = {"device": "meta", "dtype": home.dtype}
        self.cls_token = nn.Parameter(torch.empty(1, 1, width, **factory)) if class_token else None
        self.pos_embed: Tensor | None
        if pos_embed == "learned":
            rows = prefix + self.patch_embed.num_patches
            self.pos_embed = nn.Parameter(torch.empty(1, rows, width, **factory))
        else:
            fixed = pos_embed == "sincos2d"
            grid = self.patch_embed.grid_size
            self.register_buffer("pos_embed", sincos2d(grid, width, prefix).to(home) if fixed else None)
        self.pos_drop = nn.Dropout(dropout)
        self.patch_drop = nn.Identity()
        self.norm_pre = nn.Identity()

    # ---- forward ----

    def forward(self, images: Tensor) -> Tensor:
        if not (isinstance(images, Tensor) and self._class_token_is_enough()):
            return self.forward_head(self.forward_features(images))
        tokens = self.embed(images)
        last: Any
        *blocks, last = self.blocks
        for block in blocks:
            tokens = self._run(block, tokens)
        # Of the last block only what the logits depend on: 6 % less work in ViT-B/16, forward and backward.
        return self.forward_head(call(self.ops, self.norm, self._run(last.fused, tokens, 1)))

    def forward_features(self, images: Tensor) -> Tensor:
        """images [B, in_chans, height, width] -> tokens [B, N, C] after the last norm."""
        tokens = self.embed(images)
        if not (self.grad_checkpointing or untouched(self.blocks, nn.Sequential)):
            return call(self.ops, self.norm, self.blocks(tokens))
        for block in self.blocks:
            tokens = self._run(block, tokens)
        return call(self.ops, self.norm, tokens)

    def _class_token_is_enough(self) -> bool:
        """Whether nobody would notice that the last block computes the class token alone: logits are read from it, no
        hook sees the other tokens, and no part of the path is replaced."""
        return (
            self.global_pool == "token"
            and type(self) is VisionTransformer
            and not any(n in self.__dict__ or getattr(VisionTransformer, n) is not f for n, f in _PATH.items())
            and untouched(self.blocks, nn.Sequential)
            and len(self.blocks) > 0
            and untouched(last := self.blocks[-1], Block)
            and isinstance(last, Block)  # for the type checker
            and untouched(self.norm, type(self.norm))
            and type(self.norm) in (nn.LayerNorm, nn.Identity)
            and last.can_fuse()
            and not last.drops_elements()  # random numbers would be drawn for other tokens
        )

    def embed(self, images: Tensor) -> Tensor:
        """images [B, in_chans, height, width] -> tokens [B, N, C] as the first block takes them."""
        ops = self.ops
        self._check_input(images)
        return call(ops, self.norm_pre, call(ops, self.patch_drop, self._pos_embed(self.patch_embed(images))))

    def _pos_embed(self, patches: Tensor) -> Tensor:
        """patches [B, patches, C] -> with the class token before them and positions added [B, N, C]; timm's name."""
        return call(self.ops, self.pos_drop, self.ops.movement.tokens(patches, self.cls_token, self.pos_embed))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """tokens [B, N, C] -> logits [B, num_classes], or with pre_logits the pooled features [B, C]."""
        ops = self.ops
        x = call(ops, self.head_drop, call(ops, self.fc_norm, self.pool(tokens)))
        return x if pre_logits else call(ops, self.head, x)

    def pool(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C] -> the class token or the mean of the patch tokens [B, C]; all of them for ""."""
        if self.global_pool == "token":
            return self.ops.movement.first(tokens, 1).squeeze(1)
        if self.global_pool == "avg":
            return self.ops.movement.mean(tokens, self.num_prefix_tokens)
        return tokens

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """(tokens after the last norm, [the patch tokens after each wanted block]), with timm's arguments.

        indices: the last n blocks (int), those (sequence, negative from the end) or all (None). Each entry is
        [B, C, grid height, grid width], or [B, N, C] with output_fmt "NLC"; with return_prefix_tokens a pair
        of it and the class token [B, prefix, C]. norm applies the final norm to each; stop_early skips the
        blocks after the last wanted one; intermediates_only returns the list alone.
        """
        checks.choice(output_fmt=(output_fmt, ("NCHW", "NLC")))
        wanted = _block_indices(indices, len(self.blocks))
        last = max(wanted) if stop_early else len(self.blocks) - 1
        tokens = self.embed(images)
        taken: list[Any] = []
        for i, block in enumerate(self.blocks[: last + 1]):
            tokens = self._run(block, tokens)
            if i in wanted:
                taken.append(self._split_prefix(call(self.ops, self.norm, tokens) if norm else tokens, output_fmt))
        if not (return_prefix_tokens and self.num_prefix_tokens):
            taken = [patches for patches, _ in taken]
        return taken if intermediates_only else (call(self.ops, self.norm, tokens), taken)

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """The outputs of the last n (or the named) blocks, in the form the DINO family uses."""
        fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(images, n, return_prefix_tokens, norm, True, fmt, intermediates_only=True)

    def _run(self, block: Callable[..., Tensor], tokens: Tensor, *args: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint  # torch 2.6 brings sympy with it: 0.5 s

            return checkpoint(block, tokens, *args, use_reentrant=False)
        return block(tokens, *args)

    def _split_prefix(self, tokens: Tensor, output_fmt: str) -> tuple[Tensor, Tensor]:
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        if output_fmt == "NCHW":
            patches = patches.transpose(1, 2).unflatten(2, self.patch_embed.grid_size).contiguous()
        return patches, prefix

    def _check_input(self, images: Tensor) -> None:
        if type(images).__module__ == "torch.fx.proxy" or type(self.patch_embed) is not PatchEmbed:
            return  # nothing to look at, or the affair of whoever replaced it
        if not isinstance(images, Tensor):
            raise TypeError(
                f"vit: images must be a tensor, got {type(images).__name__}; model.preprocess makes one from a PIL "
                "image, torch.from_numpy from an array"
            )
        weight = getattr(self.patch_embed.proj, "weight", None)
        if not isinstance(weight, Tensor):
            return
        if images.device != weight.device:
            raise ValueError(
                f"vit: images are on {images.device}, the model on {weight.device}; use images.to(model.device)"
            )
        if images.dtype == weight.dtype:
            return
        if not images.is_floating_point():
            raise ValueError(
                f"vit: images are {images.dtype}, not normalised floating point; model.preprocess makes them "
                "from PIL images"
            )
        if not torch.is_autocast_enabled(images.device.type):
            raise ValueError(
                f"vit: images are {images.dtype}, the model's parameters {weight.dtype}; "
                "use images.to(model.dtype) or model.to(images.dtype)"
            )

    def specs(self, device: torch.device, dtype: torch.dtype, training: bool) -> list[Spec]:
        """Everything the forward asks of the ops, fused or not."""
        return specs_of(self, device, dtype, training)

    def extra_repr(self) -> str:
        return f"{self.name}, backend={self.backend!r} (runs on {self._plan!r})"

    # ---- what timm's tools ask of a model ----

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The model's preprocessing in timm's form: what timm.data.resolve_model_data_config reads."""
        preprocess = self.preprocess
        return {
            "architecture": self.name,
            "num_classes": self.num_classes,
            "input_size": (preprocess.in_chans, *preprocess.img_size),
            "fixed_input_size": True,
            "pool_size": None,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_pct,
            "crop_mode": preprocess.crop_mode,
            "mean": preprocess.mean,
            "std": preprocess.std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }

    #: timm's older name of the same.
    default_cfg = pretrained_cfg

    def get_classifier(self) -> nn.Module:
        """The last linear layer; an Identity when num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a newly initialised one; 0 removes it. The last norm keeps its place."""
        if global_pool is not None:
            checks.choice(global_pool=(global_pool, POOLS))
            checks.pooling(global_pool, self.cls_token is not None)
            self.global_pool = global_pool
        checks.classes(num_classes)
        self.num_classes = num_classes
        self.class_names = None  # they were those of the old head
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.embed_dim, num_classes, device=self.device, dtype=self.dtype)
            init.init_linear(self.head, "head", self.weight_init, num_classes, init.Draws())
        self.head.train(self.training)
        self.replan()

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into a stem and the blocks, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        self.grad_checkpointing = enable


#: What the short way of `forward` passes over or gives other tokens; an exchanged one is called.
_PATH = {name: getattr(VisionTransformer, name) for name in ("forward_features", "forward_head", "pool")}
know(VisionTransformer)


def _take_room(model: nn.Module, device: torch.device) -> None:
    """Moves a model without values from the meta device to `device`.

    Not by to_empty(): empty_like() of a meta tensor imports PyTorch's symbolic shapes, 0.6 s.
    """
    for module in model.modules():
        for name, meta in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(meta.shape, dtype=meta.dtype, device=device)))


def _block_indices(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Positions of the wanted blocks in rising order; None is all, a number the last ones."""
    if indices is None:
        return list(range(depth))
    wanted = range(-indices, 0) if isinstance(indices, int) else indices
    if not wanted or min(wanted) < -depth or max(wanted) >= depth:
        raise ValueError(f"vit: block indices {indices} do not lie in the model's {depth} blocks")
    return sorted({i % depth for i in wanted})
