"""Meta's Perception Encoder: OpenAI's names, rotary positions, LayerScale in two of three lines, attention pooling.

timm has the model as Eva. Its three lines differ by what their files hold: core has the pool, lang and spatial
neither pool nor last norm.
"""

from __future__ import annotations

from ..layout import Converted, Layout, split_query, to
from .openai_clip import BLOCK, BODY, TEXT, is_clip

POOL = (
    to("attn_pool.probe", "attn_pool.latent"),
    to("attn_pool.attn.in_proj_weight", ("attn_pool.q.weight", "attn_pool.kv.weight"), split_query),
    to("attn_pool.attn.in_proj_bias", ("attn_pool.q.bias", "attn_pool.kv.bias"), split_query),
    to("attn_pool.attn.out_proj.{w}", "attn_pool.proj.{w}"),
    to("attn_pool.layernorm.{w}", "attn_pool.norm.{w}"),
    to("attn_pool.mlp.c_fc.{w}", "attn_pool.mlp.fc1.{w}"),
    to("attn_pool.mlp.c_proj.{w}", "attn_pool.mlp.fc2.{w}"),
)


def _finish(result: Converted) -> None:
    state = result.state
    result.implied |= {"norm_eps": 1e-5, "class_token": "cls_token" in state}
    if "attn_pool.latent" in state:
        result.implied["global_pool"] = "map"
    if "norm.weight" not in state:
        result.implied |= {"use_post_transformer_norm": False, "use_fc_norm": False}


LAYOUT = Layout(
    name="Perception Encoder",
    marks=("conv1.weight",),
    needs=(BLOCK + "ln_1.weight",),
    told=lambda names: not is_clip(names),
    rules=(*BODY, to(BLOCK + "ls_{i}.gamma", "blocks.{n}.gamma_{i}"), *POOL),
    dropped={r"(.*\.)?rope\..*freqs.*": "rotary frequencies, which follow from the sizes"},
    outside=TEXT,
    base="vit_pe_core_base_patch16_224",
    finish=_finish,
)
