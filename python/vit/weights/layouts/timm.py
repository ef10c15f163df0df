"""timm's own names: those of VisionTransformer, of Eva and of NaFlexVit are taken as they are.

Also the releases that were built on timm's: MAE, DeiT, DINO, MSN, I-JEPA; what is left of their training is dropped.
"""

from __future__ import annotations

from ..layout import Layout

MASKED = "for pretraining by masked images"
DINO = "the projection of DINO's pretraining"

LAYOUT = Layout(
    name="timm",
    marks=("patch_embed.proj.weight", "embeds.proj.weight"),
    base="vit_base_patch16_224",
    lacks=(
        *("register_tokens", "storage_tokens", "blocks.{n}.mlp.w12.weight", "blocks.{n}.mlp.w1.weight"),
        *("rope_embed.periods", "blocks.0.{n}.norm1.weight", "blocks.{n}.attn.inner_attn_ln.weight"),
        *("blocks.{n}.attn.qkv.bias_mask", "blocks.{n}.attn.rope.freqs_cos"),
    ),
    dropped={
        r"(patch_embed\.)?mask_token|decoder($|[._]).*": MASKED,
        r"head\.(mlp|last_layer)\..*|(dino|ibot)_head\..*": DINO,
        r"lm_head\..*": MASKED,
        r"n_averaged|num_updates|decay": "a counter of the running average",
        r"patch_embed\.num_batches_tracked|global_step": "a counter of the training",
    },
)
