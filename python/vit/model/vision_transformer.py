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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import BackendError, Spec
from ..preprocess import Preprocess
from . import init
from .blocks import Block
from .features import Intermediates
from .heads import Heads
from .layers import PatchDropout, PatchEmbed
from .options import DEFAULTS, POOLS, POSITIONS, Options, signature_of, spelled
from .packed import Packs
from .parts import NORM_KINDS, make_norm, make_patch_embed, make_representation
from .planned import CallsOps, HasBuffers, Planned
from .pool import AttentionPoolLatent
from .pos_embed import FIXED, resample
from .specs import specs_of
from .tools import TimmTools
from .torch_layers import call, know, untouched

__all__ = ["POOLS", "POSITIONS", "VisionTransformer"]

#: Keyword-only arguments of a model beside its options, and their defaults.
PLACE: dict[str, Any] = {"backend": "auto", "training": True, "name": "vit", "device": None, "dtype": None}


class VisionTransformer(CallsOps, Planned, Heads, Packs, Intermediates, TimmTools):
    """images [B, in_chans, height, width] -> logits [B, num_classes].

    A list of images [in_chans, height, width], with dynamic_img_size of several sizes, is one forward of their packed
    tokens, each image as if it were alone; what has tokens of images is then a list.

    Sizes: img_size and patch_size are one side or (height, width); img_size must be a multiple of patch_size unless
    dynamic_img_pad (edges padded with zeros; also called dynamic_pad) or drop_edge (the rest is not read, as in timm).
    embed_dim must be a multiple of num_heads; the MLP is int(embed_dim * mlp_ratio) wide. dynamic_img_size takes
    images of any size that can be cut, and resamples the positions to it.

    Tokens: class_token, then reg_tokens registers, then patches; no_embed_class leaves positions to the patches.
    pos_embed "learned", "sincos2d", "sincos1d" (both fixed) or "none"; pos_resize: how they get another grid, None for
    timm's rule. patch_embed "conv" or "linear": how the projection's weight is kept. patch_stride: pixels from one
    patch to the next, None for the patch's side; with a smaller one patches overlap.

    Blocks: act_layer "gelu" (erf), "gelu_tanh", "quick_gelu", "silu" or "relu"; mlp_layer "mlp", "swiglu_packed" or
    "swiglu" (gated by act_layer); norm_layer "layernorm" or "rmsnorm", with norm_eps; init_values: LayerScale, from
    that value; qk_norm, scale_attn_norm, scale_mlp_norm: more norms; qkv_bias, proj_bias; pre_norm: one before blocks,
    and no bias of the patches; embed_norm_layer: one in the patch embedding, with embed_norm_eps (None:
    norm_eps).

    Head: global_pool "token" reads the class token, "avg", "max" and "avgmax" the patches (with pool_include_prefix all
    tokens), "map" pools by attention, "" returns all tokens. final_norm: a last norm; fc_norm: after the pooling, None:
    for the means. representation_size: 0, or the width of a linear layer with a tanh (`pre_logits`) before the head.
    decoder: channels of stages that double the sides of the grid, for logits [B, num_classes, h, w].

    Regularisation, in training mode only: drop_rate before the head, pos_drop_rate after the position embedding,
    patch_drop_rate of whole patches, proj_drop_rate after each projection and in the MLP, attn_drop_rate on attention
    probabilities (which only the reference backend has), drop_path_rate rising linearly to the last block.
    weight_init: see vit.model.init; fix_init divides the last layers of block i by sqrt(2 (i + 1)).

    backend, training, name: see vit.create. Raises ValueError for options that do not fit together, BackendError when a
    named backend cannot run the model.
    """

    #: The arguments that vit.create passes on -> their defaults, and how it writes them.
    ARGUMENTS = DEFAULTS
    spelled = staticmethod(spelled)
    reg_token: nn.Parameter | None
    head: nn.Module
    #: Whether logits depend on the class token alone where that is what is pooled.
    reads_one_token = True
    #: Whether pooling by attention reads all tokens, also those before the patches.
    pools_prefix = False
    #: What the arguments are checked by.
    Options: type[Options] = Options

    def __init__(
        self,
        *sizes: Any,
        backend: str = "auto",
        training: bool = True,
        name: str = "vit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **arch: Any,
    ) -> None:
        super().__init__()
        positional = dict(zip(self.ARGUMENTS, sizes, strict=False))
        if twice := sorted(positional.keys() & arch.keys()):
            raise TypeError(f"vit: VisionTransformer got {', '.join(twice)} twice")
        if len(sizes) > len(positional):
            raise TypeError(f"vit: {type(self).__name__} takes {len(positional)} arguments, got {len(sizes)}")
        arch = self.spelled(positional | arch)
        if unknown := [key for key in arch if key not in self.ARGUMENTS]:
            raise TypeError(f"vit: {type(self).__name__} has no argument {', '.join(map(repr, unknown))}")
        self.options = o = self.Options(**arch)
        self.name, self.backend = name, backend
        self.num_classes = o.num_classes
        self.embed_dim = self.num_features = o.embed_dim
        self.head_hidden_size = o.representation_size or o.embed_dim
        self.in_chans, self.num_heads, self.mlp_hidden = o.in_chans, o.num_heads, o.mlp_hidden
        self.act_layer, self.attn_drop_rate = o.act_layer, o.attn_drop_rate
        self.global_pool, self.pool_include_prefix = o.global_pool, o.pool_include_prefix
        # Averaging comes before the norm unless told otherwise, as in timm; the name of its parameters says which.
        self.norm_after_pool = o.norm_after_pool
        self.has_class_token, self.num_reg_tokens = o.class_token, o.reg_tokens
        self.no_embed_class, self.dynamic_img_size = o.no_embed_class, o.dynamic_img_size
        self.weight_init = o.weight_init
        self.grad_checkpointing = False

        home = torch.empty(0, device=device, dtype=dtype)  # what None stands for
        # Parameters get room once all are known, and their values by init_weights or with the weights that are loaded.
        factory: dict[str, Any] = {"device": "meta", "dtype": home.dtype}
        self._build_patches(factory)
        self.num_prefix_tokens = o.prefix_tokens + (not self.reads_one_token)
        # Now, so that a refusal comes before the large part is built.
        self._plan = self.plan_for(home.device, home.dtype, training)
        self._build_embedding(home, factory)
        rates = [o.drop_path_rate * i / max(o.depth - 1, 1) for i in range(o.depth)]
        self.blocks = self._build_blocks(rates, factory)
        self._build_head(factory)
        init.take_room(self, home.device)
        self._place_buffers(home.device, home.dtype)
        self._init_weights()

        self.class_names: tuple[str, ...] | None = None
        self.preprocess = Preprocess(self.patch_embed.img_size, in_chans=o.in_chans)
        self.bind(self._plan)
        self.train(training)

    def _build_patches(self, factory: dict[str, Any]) -> None:
        self.patch_embed = make_patch_embed(self.options, **factory)

    def _build_embedding(self, home: Tensor, factory: dict[str, Any]) -> None:
        """What stands between the patches and the first block, in the order of timm's modules."""
        o, width = self.options, self.embed_dim

        def tokens(count: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(1, count, width, **factory)) if count else None

        self.cls_token = tokens(int(o.class_token))
        self.register_parameter("reg_token", tokens(o.reg_tokens))
        self.pos_embed: Tensor | None
        rows = 0 if o.no_embed_class else self.num_prefix_tokens
        if o.pos_embed == "learned":
            self.pos_embed = tokens(rows + self.patch_embed.num_patches)
        else:
            table = FIXED.get(o.pos_embed)
            fixed = None if table is None else table(self.patch_embed.grid_size, width, rows).to(home)
            self.register_buffer("pos_embed", fixed)
        self.pos_drop = nn.Dropout(o.pos_drop_rate)
        dropped = o.patch_drop_rate
        self.patch_drop = PatchDropout(dropped, self.num_prefix_tokens) if dropped else nn.Identity()
        self.norm_pre = make_norm(o.norm_layer, width, o.norm_eps, **factory) if o.pre_norm else nn.Identity()

    def _build_blocks(self, rates: list[float], factory: dict[str, Any]) -> Any:
        o = self.options
        return nn.Sequential(*[Block(o.embed_dim, o.num_heads, o, rate, **factory) for rate in rates])

    def _init_weights(self) -> None:
        init.init_weights(self, self.options.weight_init, self.num_classes)

    def _place_buffers(self, device: torch.device, dtype: torch.dtype) -> None:
        """Computes what no state dict holds where the parameters are."""
        for module in self.modules():
            if isinstance(module, HasBuffers):
                module.init_non_persistent_buffers(device, dtype)

    def _build_head(self, factory: dict[str, Any]) -> None:
        o = self.options

        def last_norm(here: bool) -> nn.Module:
            wanted = o.final_norm and here
            return make_norm(o.norm_layer, o.embed_dim, o.norm_eps, **factory) if wanted else nn.Identity()

        self.norm: nn.Module = last_norm(not o.norm_after_pool)
        self.attn_pool = AttentionPoolLatent(o, **factory) if o.global_pool == "map" else None
        self.fc_norm: nn.Module = last_norm(o.norm_after_pool)
        if o.representation_size:  # timm's modules have no such name
            self.pre_logits = make_representation(o, **factory)
        self.head_drop = nn.Dropout(o.drop_rate)
        self.head = self._make_head(**factory)

    # ---- forward ----

    def forward(self, images: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            return self.forward_head(self.forward_features(images, attn_mask, is_causal))
        if not (isinstance(images, (Tensor, list, tuple)) and self._class_token_is_enough()):
            return self.forward_head(self.forward_features(images))
        tokens, given = self.start(images)
        last: Any
        *blocks, last = self.blocks
        for block, more in zip(blocks, given[:-1], strict=True):
            tokens = self._run(block, tokens, **{**self.NO_MASKS, **more})
        # Of the last block only what the logits depend on: 6 % less work in ViT-B/16, forward and backward.
        tokens = call(self.ops, self.norm, self._run(last.fused, tokens, queries=1, **given[-1]))
        return self.forward_head(tokens if isinstance(images, Tensor) else tokens.transpose(0, 1))

    def forward_features(self, images: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """images [B, in_chans, height, width] -> tokens [B, N, C] after the last norm; of a list of images a list of
        tokens [N, C].

        attn_mask (True: may be seen, or added to the scores) and is_causal are scaled_dot_product_attention's.
        """
        tokens, given = self.start(images)
        listed = isinstance(images, (list, tuple))
        if attn_mask is not None or is_causal:
            if isinstance(tokens, Tensor):  # in a trace of torch.fx masks are places that may stay empty
                self._check_masked(listed)
            given = [more | {"attn_mask": attn_mask, "is_causal": is_causal} for more in given]
        elif not (listed or self.NO_MASKS or isinstance(self.blocks, nn.ModuleList)) and not (
            isinstance(self.blocks, nn.Sequential)
            and (self.grad_checkpointing or untouched(self.blocks, nn.Sequential))
        ):
            return call(self.ops, self.norm, self.blocks(tokens))
        for block, more in zip(self.blocks, given, strict=True):
            tokens = self._run(block, tokens, **{**self.NO_MASKS, **more})
        tokens = call(self.ops, self.norm, tokens)
        return self._features_of_each(tokens, given[0]["lengths"]) if listed else tokens

    def _check_masked(self, listed: bool) -> None:
        if listed:
            raise ValueError("vit: attn_mask and is_causal go with images of one size [B, in_chans, height, width]")
        if self.backend not in ("auto", "reference"):
            raise BackendError(
                f"vit: {self.name}: attn_mask and is_causal are computed by PyTorch, not by backend "
                f'\'{self.backend}\'; use backend="auto" or "reference"'
            )

    def _class_token_is_enough(self) -> bool:
        """Whether nobody would notice that the last block computes the class token alone: logits are read from it, no
        hook sees the other tokens, and no part of the path is replaced."""
        return (
            self.global_pool == "token"
            and self.attn_pool is None
            and (kind := _ONE_TOKEN.get(type(self))) is not None
            and not any(n in self.__dict__ or getattr(type(self), n) is not f for n, f in _PATH[type(self)].items())
            and type(self.blocks) in (nn.Sequential, nn.ModuleList)
            and untouched(self.blocks, type(self.blocks))
            and len(self.blocks) > 0
            and untouched(last := self.blocks[-1], kind)
            and untouched(self.norm, type(self.norm))
            and type(self.norm) in (*NORM_KINDS, nn.Identity)
            and last.can_fuse()
            and not last.drops_elements()  # random numbers would be drawn for other tokens
        )

    def start(self, images: Any) -> tuple[Tensor, list[dict[str, Any]]]:
        """images -> tokens as the first block takes them, and what else each block takes."""
        if isinstance(images, (list, tuple)):
            return self._start_packed(images)
        count = len(self.blocks) if isinstance(self.blocks, (nn.Sequential, nn.ModuleList)) else 0  # else called whole
        return self.embed(images), [{}] * count

    def embed(self, images: Tensor) -> Tensor:
        """images [B, in_chans, height, width] -> tokens [B, N, C] as the first block takes them."""
        ops = self.ops
        self._check_input(images)
        return call(ops, self.norm_pre, call(ops, self.patch_drop, self._pos_embed(self.patch_embed(images))))

    def _pos_embed(self, patches: Tensor) -> Tensor:
        """patches [B, patches, C], or [B, rows, columns, C] where sizes are dynamic -> with the prefix before them and
        positions added [B, N, C]; timm's name."""
        tokens, position = self.ops.movement.tokens, self.pos_embed
        if self.dynamic_img_size:
            position = self._positions((patches.shape[1], patches.shape[2]))
            patches = patches.flatten(1, 2)
        if self.no_embed_class and position is not None:
            patches, position = tokens(patches, None, position), None
        return call(self.ops, self.pos_drop, tokens(patches, self._prefix(), position))

    def _prefix(self) -> Tensor | None:
        """The tokens before the patches [1, prefix, C], of which each image gets a copy."""
        if self.reg_token is None or self.cls_token is None:
            return self.reg_token if self.cls_token is None else self.cls_token
        return torch.cat([self.cls_token, self.reg_token], dim=1)

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        """The position embedding for another grid."""
        table, prefix = self.pos_embed, 0 if self.no_embed_class else self.num_prefix_tokens
        if table is None or grid == self.patch_embed.grid_size:
            return table
        if not isinstance(table, nn.Parameter):
            return FIXED[self.options.pos_embed](grid, self.embed_dim, prefix).to(table)
        return resample(table, grid, self.patch_embed.grid_size, prefix, self.options.pos_resize)

    def _run(self, block: Callable[..., Tensor], tokens: Tensor, **more: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint  # torch 2.6 brings sympy with it: 0.5 s

            return checkpoint(block, tokens, use_reentrant=False, **more)
        return block(tokens, **more)

    def _check_input(self, images: Tensor) -> None:
        if type(images).__module__ == "torch.fx.proxy" or type(self.patch_embed) is not PatchEmbed:
            return  # nothing to look at, or the affair of whoever replaced it
        if not isinstance(images, Tensor):
            raise TypeError(
                f"vit: images must be a tensor, got {type(images).__name__}; model.preprocess makes one from a PIL "
                "image, torch.from_numpy from an array"
            )
        # A parametrization (weight norm, spectral norm) computes at each look: not here, only when its layer runs.
        held = self.patch_embed.proj.__dict__
        weight = held["_parameters"]["weight"] if "weight" in held["_parameters"] else held.get("weight")
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
        """Every kind of call that the forward makes, fused or not."""
        return specs_of(self, device, dtype, training)

    def extra_repr(self) -> str:
        return f"{self.name}, backend={self.backend!r} (runs on {self._plan!r})"


VisionTransformer.__signature__ = signature_of(PLACE)  # type: ignore[attr-defined]
#: What the short way of `forward` passes over or gives other tokens; an exchanged one is called.
_PATH: dict[type, dict[str, Any]] = {}
#: Classes of models that take it -> the class of their blocks.
_ONE_TOKEN: dict[type, type[nn.Module]] = {}


def takes_short_way(model: type, block: type[nn.Module]) -> None:
    """Remembers a class of models whose last block may compute the class token alone."""
    _ONE_TOKEN[model] = block
    _PATH[model] = {name: getattr(model, name) for name in ("forward_features", "forward_head", "pool")}


takes_short_way(VisionTransformer, Block)
know(VisionTransformer)
