"""EVA-02 (arXiv:2303.11331), EVA, DINOv3 (arXiv:2508.10104), Perception Encoder (arXiv:2504.13181) and RoPE-ViT
(arXiv:2403.13298): the Vision Transformers of timm's eva.py, with its parameter names.

    tokens = [class; registers; patches W + b] + position
    tokens = tokens + gamma_1 attention(norm1(tokens))     queries and keys of patches rotated by their places
    tokens = tokens + gamma_2 mlp(norm2(tokens))           for each block
    logits = head(norm(mean of patches))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import Spec
from . import eva_specs, init
from .attention_rope import AttentionRope, EvaAttention
from .eva_blocks import EvaBlock, EvaBlockPostNorm
from .eva_options import EvaOptions
from .layers import PatchDropout
from .mlp import MLPS
from .options import defaults_of, signature_of
from .parts import make_norm
from .pool import AttentionPoolLatent
from .rope import Grid, Rotary, RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from .torch_layers import call, know
from .vision_transformer import PLACE, VisionTransformer, takes_short_way


class PatchDropoutWithIndices(PatchDropout):
    """Patch dropout that also says which patches are kept [B, N'], None for all."""

    def forward(self, x: Tensor) -> Any:
        if not self.training or self.prob == 0.0:
            return x, None
        kept = self.kept(x)
        return self.pick(x, kept), kept


class Eva(VisionTransformer):
    """images [B, in_chans, height, width] -> logits [B, num_classes].

    The arguments of VisionTransformer, under its names or those of timm's Eva (num_reg_tokens, use_abs_pos_emb,
    use_pre_transformer_norm, use_fc_norm, scale_mlp, scale_attn_inner), and:

    Positions: use_rot_pos_emb, with rope_type "cat", "mixed" or "dinov3" and its rope_temperature, rope_grid_indexing
    ("ij": y before x; "xy"), rope_grid_offset, rope_rotate_half and ref_feat_shape; see vit.model.rope.
    rope_shift_coords, rope_jitter_coords and rope_rescale_coords disturb coordinates in training.

    Blocks: attn_type "eva" has no bias of the keys, "rope" has; qkv_fused: one projection or three. swiglu_mlp gates
    the MLP, its width rounded up to a multiple of swiglu_align_to. use_post_norm puts the norms behind the branches.

    Head: use_post_transformer_norm: whether there is a norm before the pooling; None: where use_fc_norm does not put
    one behind it. Pooling by attention reads all tokens, by attn_pool_num_heads heads and with attn_pool_mlp_ratio.
    """

    Options = EvaOptions
    ARGUMENTS = defaults_of(EvaOptions)
    options: EvaOptions
    pools_prefix = True
    NO_MASKS = {"attn_mask": None, "is_causal": False}  # noqa: RUF012

    def _build_embedding(self, home: Tensor, factory: dict[str, Any]) -> None:
        o = self.options
        super()._build_embedding(home, factory)
        if o.patch_drop_rate:
            self.patch_drop = PatchDropoutWithIndices(o.patch_drop_rate, self.num_prefix_tokens)
        else:
            self.patch_drop = None  # type: ignore[assignment]
        self.rope = self._make_rope(factory) if o.use_rot_pos_emb else None
        self.rope_mixed = isinstance(self.rope, RotaryEmbeddingMixed)
        # timm's order of modules.
        self.norm_pre = self._modules.pop("norm_pre")  # type: ignore[assignment]

    def _make_rope(self, factory: dict[str, Any]) -> Rotary:
        o = self.options
        common: dict[str, Any] = {
            "temperature": o.rope_temperature,
            "feat_shape": None if o.dynamic_img_size else self.patch_embed.grid_size,
            "grid_indexing": o.rope_grid_indexing,
            "shift_coords": o.rope_shift_coords,
            "jitter_coords": o.rope_jitter_coords,
            "rescale_coords": o.rope_rescale_coords,
        }
        if o.rope_type == "mixed":
            return RotaryEmbeddingMixed(o.embed_dim, o.depth, o.num_heads, factory=factory, **common)
        width = o.embed_dim // o.num_heads
        common |= {"grid_offset": o.rope_grid_offset, "rotate_half": o.rope_rotate_half}
        if o.rope_type == "dinov3":
            return RotaryEmbeddingDinoV3(width, **common)
        reference = o.ref_feat_shape
        reference = (reference, reference) if isinstance(reference, int) else reference and tuple(reference)
        return RotaryEmbeddingCat(width, ref_feat_shape=reference, **common)

    def _build_blocks(self, rates: list[float], factory: dict[str, Any]) -> nn.Module:
        o = self.options
        attention = AttentionRope if o.attn_type == "rope" else EvaAttention
        block = EvaBlockPostNorm if o.use_post_norm else EvaBlock
        return nn.ModuleList(
            [block(o, attention(o, **factory), MLPS[o.mlp_layer](o, **factory), rate, **factory) for rate in rates]
        )

    def _build_head(self, factory: dict[str, Any]) -> None:
        o = self.options

        def norm(wanted: bool) -> nn.Module:
            return make_norm(o.norm_layer, o.embed_dim, o.norm_eps, **factory) if wanted else nn.Identity()

        self.norm = norm(o.norm_after_blocks)
        self.attn_pool = AttentionPoolLatent(o.attn_pool, **factory) if o.global_pool == "map" else None
        self.fc_norm = norm(o.norm_after_pool)
        self.head_drop = nn.Dropout(o.drop_rate)
        self.head = self._make_head(**factory)

    def _init_weights(self) -> None:
        _init_weights(self)

    # ---- forward ----

    def start(self, images: Any) -> tuple[Tensor, list[dict[str, Any]]]:
        """images [B, in_chans, height, width] -> tokens [B, N, C] as the first block takes them, and for each block its
        table of rotary positions."""
        if isinstance(images, (list, tuple)):
            return self._start_packed(images)
        self._check_input(images)
        patches = self.patch_embed(images)
        tokens, rope = self._pos_embed(patches)
        tokens = call(self.ops, self.norm_pre, tokens)
        mixed = rope is not None and self.rope_mixed
        return tokens, [{"rope": rope[i] if mixed else rope} for i in range(len(self.blocks))]

    def _given_packed(self, each: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Tables of positions one behind another; prefix tokens have the angle 0, which leaves them as they are."""
        tables = [[more["rope"] for more in given] for given in each if given and given[0]["rope"] is not None]
        if not tables:
            return [{}] * len(self.blocks)
        joined: dict[int, Tensor] = {}  # blocks share their table, or have one each

        def join(block: int) -> Tensor:
            own = [given[block] for given in tables]
            if id(own[0]) not in joined:
                parts = [part for table in own for part in (self._unturned(table), table)]
                joined[id(own[0])] = torch.cat(parts, dim=-2)
            return joined[id(own[0])]

        return [{"rope": join(block)} for block in range(len(self.blocks))]

    def _unturned(self, table: Tensor) -> Tensor:
        """Rows [..., prefix, 2 D] of the angle 0: sines, then cosines."""
        shape = (*table.shape[:-2], self.num_prefix_tokens, table.shape[-1] // 2)
        return torch.cat([table.new_zeros(shape), table.new_ones(shape)], dim=-1)

    def embed(self, images: Tensor) -> Tensor:
        """images [B, in_chans, height, width] -> tokens [B, N, C] as the first block takes them."""
        return self.start(images)[0]

    def _pos_embed(self, patches: Tensor) -> Any:
        """patches [B, patches, C], or [B, rows, columns, C] where sizes are dynamic -> tokens [B, N, C] and the table
        of rotary positions (of each block, for rope_type "mixed"), or None; timm's name."""
        grid: Grid | None = (patches.shape[1], patches.shape[2]) if self.dynamic_img_size else None
        tokens = super()._pos_embed(patches)
        rope = None if self.rope is None else self.rope.get_embed(grid)
        drop: Any = self.patch_drop
        if drop is None:
            return tokens, rope
        tokens, kept = drop(tokens)
        if rope is None or kept is None:
            return tokens, rope
        # [B, 1, N', 2 D], or [depth, B, H, N', 2 D]
        rope = rope.unsqueeze(-4) if self.rope_mixed else rope[None, None]
        index = kept[:, None, :, None]
        lead = rope.shape[:-4]
        batch, heads, count = kept.shape[0], rope.shape[-3], kept.shape[1]
        rope = rope.expand(*lead, batch, heads, *rope.shape[-2:])
        return tokens, rope.gather(-2, index.expand(*lead, batch, heads, count, rope.shape[-1]))

    def specs(self, device: torch.device, dtype: torch.dtype, training: bool) -> list[Spec]:
        """Every kind of call that the forward makes, fused or not."""
        return eva_specs.specs_of(self, device, dtype, training)

    # ---- what timm's tools ask of a model ----

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Takes images or patches of another size from now on: positions and patch projection are resampled.

        Raises ValueError for sizes that do not fit together.
        """
        super().set_input_size(img_size, patch_size)
        if self.rope is not None:
            self.rope.update_feat_shape(self.patch_embed.grid_size)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone."""
        return {"pos_embed", "cls_token", "reg_token"} | ({"rope.freqs"} if self.rope_mixed else set())

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch's; tables of positions are computed where the weights are."""
        result = super().load_state_dict(state_dict, strict, assign)
        if assign:
            self._place_buffers(self.device, self.dtype)
        return result


Eva.__signature__ = signature_of(PLACE, EvaOptions)  # type: ignore[attr-defined]


@torch.no_grad()
def _init_weights(model: Eva) -> None:
    """timm's distributions: trunc-normal(0.02) for linear weights and tokens, the last layers of block i divided by
    sqrt(2 (i + 1)), the head multiplied by head_init_scale."""
    o = model.options
    if o.weight_init == "skip":
        return
    draws = init.Draws()
    for name in ("pos_embed", "cls_token", "reg_token"):
        if isinstance(token := getattr(model, name), nn.Parameter):
            draws.normal(token, name, 0.02)
    for name, module in model.named_modules():
        init.init_module(module, name, o.weight_init, o.num_classes, draws)
        if isinstance(module, EvaBlock) and module.gamma_1 is not None and module.gamma_2 is not None:
            nn.init.constant_(module.gamma_1, o.init_values or 0.0)
            nn.init.constant_(module.gamma_2, o.init_values or 0.0)
        if isinstance(module, EvaAttention) and module.q_bias is not None and module.v_bias is not None:
            nn.init.zeros_(module.q_bias)
            nn.init.zeros_(module.v_bias)
    for i, block in enumerate(model.blocks):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.div_(math.sqrt(2.0 * (i + 1)))
    if isinstance(model.head, nn.Linear) and o.head_init_scale:
        model.head.weight.mul_(o.head_init_scale)
    if isinstance(rope := model.rope, RotaryEmbeddingMixed):
        angle = torch.empty(rope.depth, rope.num_heads, 1, device="cpu")
        draws.uniform(angle, "rope.freqs", torch.pi)
        rope.freqs.copy_(rope.start(angle))


know(Eva, PatchDropoutWithIndices)
takes_short_way(Eva, EvaBlock)
