"""Microsoft's BEiT-3: branch A of every layer sees images; two rows of positions stand before the class token's."""

from __future__ import annotations

from torch import Tensor

from ..layout import Layout, to

_LAYER = "encoder.layers.{n}."


def without_two_rows(table: Tensor) -> Tensor:
    return table[2:][None].contiguous()


LAYOUT = Layout(
    name="BEiT-3",
    marks=("vision_embed.proj.weight",),
    rules=(
        to("vision_embed.cls_token", "cls_token"),
        to("vision_embed.proj.{w}", "patch_embed.proj.{w}"),
        to("encoder.embed_positions.A.weight", "pos_embed", without_two_rows),
        to([f"{_LAYER}self_attn.{p}_proj.A.{{w}}" for p in "qkv"], "blocks.{n}.attn.qkv.{w}"),
        to(_LAYER + "self_attn.out_proj.A.{w}", "blocks.{n}.attn.proj.{w}"),
        to(_LAYER + "self_attn.inner_attn_ln.A.{w}", "blocks.{n}.attn.norm.{w}"),
        to(_LAYER + "self_attn_layer_norm.A.{w}", "blocks.{n}.norm1.{w}"),
        to(_LAYER + "ffn.A.fc{i}.{w}", "blocks.{n}.mlp.fc{i}.{w}"),
        to(_LAYER + "ffn.A.ffn_layernorm.{w}", "blocks.{n}.mlp.norm.{w}"),
        to(_LAYER + "final_layer_norm.A.{w}", "blocks.{n}.norm2.{w}"),
        to("fc_norm.{w}", "fc_norm.{w}"),
        to("norm.{w}", "norm.{w}"),
        to("head.{w}", "head.{w}"),
    ),
    dropped={
        r".*\.B\..*": "the branch of texts",
        r"text_embed\..*|(language_head|vision_head|logit_scale|.*pooler|mlm_head|mim_head)\b.*": "of other tasks",
        r"vision_embed\.mask_token": "for pretraining by masked images",
    },
    base="beit3_base_patch16_224",
    implied={"norm_eps": 1e-5},
)
