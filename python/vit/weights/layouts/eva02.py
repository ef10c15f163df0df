"""EVA-02's own names: `mlp.w1`, `w2`, `w3`, `inner_attn_ln`, `ffn_ln`, rotary tables in every block.

Tiny and Small have no norm inside the MLP; timm keeps their gate and its partner as one matrix, gate first. A separate
projection of q, k and v goes with the norm.
"""

from __future__ import annotations

import torch

from ..layout import Converted, Layout, Mapped, to
from .timm import LAYOUT as TIMM


def _finish(result: Converted) -> None:
    state = result.state
    normed = any(key.endswith("mlp.norm.weight") for key in state)
    for key in [key for key in state if ".mlp.fc1_g." in key]:
        other, packed = key.replace("fc1_g", "fc1_x"), key.replace("fc1_g", "fc1")
        if normed or other not in state:
            continue
        state[packed] = torch.cat([state.pop(key), state.pop(other)])
        sources = [one.sources[0] for one in result.mapped if one.targets in ((key,), (other,))]
        result.mapped = [one for one in result.mapped if one.targets not in ((key,), (other,))]
        result.mapped.append(Mapped(tuple(sources), (packed,), "stacked"))
    if any(key.endswith("attn.q_proj.weight") for key in state):
        result.rename("blocks.{n}.attn.q_bias", "blocks.{n}.attn.q_proj.bias")
        result.rename("blocks.{n}.attn.v_bias", "blocks.{n}.attn.v_proj.bias")
        result.implied["qkv_fused"] = False
    inner = any(key.endswith("attn.norm.weight") for key in state)
    result.implied |= {"scale_mlp": normed, "scale_attn_inner": inner, "swiglu_mlp": True, "norm_eps": 1e-6}
    if inner:
        result.implied["global_pool"] = "token"


LAYOUT = Layout(
    name="EVA-02",
    marks=("patch_embed.proj.weight",),
    needs=("blocks.{n}.mlp.w1.weight", "blocks.{n}.attn.inner_attn_ln.weight", "blocks.{n}.attn.rope.freqs_cos"),
    lacks=("storage_tokens", "rope_embed.periods", "blocks.{n}.attn.qkv.bias_mask"),
    rules=(
        to("blocks.{n}.mlp.w1.{w}", "blocks.{n}.mlp.fc1_g.{w}"),
        to("blocks.{n}.mlp.w2.{w}", "blocks.{n}.mlp.fc1_x.{w}"),
        to("blocks.{n}.mlp.w3.{w}", "blocks.{n}.mlp.fc2.{w}"),
        to("blocks.{n}.mlp.ffn_ln.{w}", "blocks.{n}.mlp.norm.{w}"),
        to("blocks.{n}.attn.inner_attn_ln.{w}", "blocks.{n}.attn.norm.{w}"),
    ),
    dropped={r"(.*\.)?rope\.freqs_(cos|sin)": "rotary tables, which follow from the sizes", **TIMM.dropped},
    outside={
        r"(text|positional_embedding|transformer|token_embedding|ln_final|text_projection)\b.*": "the text tower",
        r"logit_scale": "scale of a contrastive loss",
    },
    base="eva02_base_patch14_224",
    finish=_finish,
)
