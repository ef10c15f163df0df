"""The arguments of Eva beyond those of every Vision Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import checks
from .options import Options
from .rope import INDEXING

ATTENTIONS = ("eva", "rope")
ROPES = ("cat", "mixed", "dinov3")


@dataclass(frozen=True)
class EvaOptions(Options):
    """Sizes, parts and rates of an Eva; vit.model.Eva says what each means.

    Raises ValueError for values that do not exist or do not fit together.
    """

    global_pool: str = "avg"
    qkv_fused: bool = True
    attn_type: str = "eva"
    swiglu_mlp: bool = False
    swiglu_align_to: int = 0
    use_post_norm: bool = False
    use_post_transformer_norm: bool | None = None
    use_rot_pos_emb: bool = False
    rope_type: str = "cat"
    rope_grid_offset: float = 0.0
    rope_grid_indexing: str = "ij"
    rope_temperature: float = 10000.0
    rope_rotate_half: bool = False
    rope_shift_coords: float | None = None
    rope_jitter_coords: float | None = None
    rope_rescale_coords: float | None = None
    ref_feat_shape: Any = None
    attn_pool_num_heads: int | None = None
    attn_pool_mlp_ratio: float | None = None
    head_init_scale: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.absent("Eva", representation_size=self.representation_size)
        if not self.final_norm:
            raise ValueError(
                "vit: final_norm=False is an option of VisionTransformer; an Eva without a last norm has "
                "use_post_transformer_norm=False and fc_norm=False"
            )
        checks.choice(attn_type=(self.attn_type, ATTENTIONS), rope_type=(self.rope_type, ROPES))
        checks.choice(rope_grid_indexing=(self.rope_grid_indexing, INDEXING))
        checks.choice(pos_embed=(self.pos_embed, ("learned", "none")))
        checks.choice(weight_init=(self.weight_init, ("", "reset", "skip")))
        checks.count(swiglu_align_to=self.swiglu_align_to)
        checks.finite(rope_grid_offset=self.rope_grid_offset, head_init_scale=self.head_init_scale)
        checks.number(1e-30, rope_temperature=self.rope_temperature)
        if self.ref_feat_shape is not None:
            checks.sides("ref_feat_shape", self.ref_feat_shape)
        self._check_heads()
        if self.rope_type == "mixed" and self.rope_rotate_half:
            raise ValueError("vit: rope_type='mixed' turns neighbours; rope_rotate_half must be False")
        if self.use_post_norm and (self.qk_norm or self.init_values is not None):
            raise ValueError("vit: use_post_norm goes without qk_norm and init_values")
        if self.swiglu_mlp:
            if self.act_layer not in ("gelu", "silu"):  # the default, and what it becomes
                raise ValueError(
                    f"vit: swiglu_mlp=True gates by SiLU; act_layer={self.act_layer!r} does not go with it"
                )
            split = self.scale_mlp_norm or (self.swiglu_align_to and not self.use_post_norm)
            object.__setattr__(self, "mlp_layer", "swiglu" if split else "swiglu_packed")
            object.__setattr__(self, "act_layer", "silu")

    def _check_heads(self) -> None:
        if self.use_rot_pos_emb and self.embed_dim // self.num_heads % 4:
            raise ValueError(
                f"vit: rotary positions of two axes need heads of a multiple of 4 elements, and embed_dim "
                f"{self.embed_dim} / num_heads {self.num_heads} is {self.embed_dim // self.num_heads}"
            )
        if self.attn_pool_num_heads is not None:
            checks.positive(attn_pool_num_heads=self.attn_pool_num_heads)
            if self.embed_dim % self.attn_pool_num_heads:
                raise ValueError(
                    f"vit: embed_dim {self.embed_dim} is not a multiple of attn_pool_num_heads "
                    f"{self.attn_pool_num_heads}"
                )
        if self.attn_pool_mlp_ratio is not None:
            checks.mlp_width(self.embed_dim, self.num_heads, self.attn_pool_mlp_ratio)

    @property
    def mlp_hidden(self) -> int:
        """The width of the MLP's first layer; of a packed gated one, of both halves."""
        hidden = int(self.embed_dim * self.mlp_ratio)
        if self.mlp_layer == "swiglu" and self.swiglu_align_to:
            hidden += -hidden % self.swiglu_align_to
        return 2 * hidden if self.mlp_layer == "swiglu_packed" else hidden

    @property
    def norm_after_pool(self) -> bool:
        """Whether there is a norm behind the pooling."""
        return self.global_pool == "avg" if self.fc_norm is None else self.fc_norm

    @property
    def norm_after_blocks(self) -> bool:
        """Whether there is one before it."""
        given = self.use_post_transformer_norm
        return not self.norm_after_pool if given is None else given

    @property
    def attn_pool(self) -> Options:
        """The sizes of the pooling by attention."""
        return Options(
            embed_dim=self.embed_dim,
            num_heads=self.attn_pool_num_heads or self.num_heads,
            mlp_ratio=self.attn_pool_mlp_ratio or self.mlp_ratio,
            norm_layer=self.norm_layer,
            norm_eps=self.norm_eps,
        )
