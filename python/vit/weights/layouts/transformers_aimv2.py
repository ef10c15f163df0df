"""transformers' AIMv2: RMSNorm, gated MLP, no biases, no class token.

The attention pool of the `lit` models has no query projection, no norm and no MLP; timm's AIMv2 means the patches.
"""

from __future__ import annotations

from typing import Any

from ...support.records import Record
from .. import transformers_config as hf
from ..layout import Layout, to
from .transformers_clip import TEXT, as_batch_of_one

KINDS = ("aimv2", "aimv2_vision_model")
_BLOCK = "encoder.layers.{n}."


def configure(record: Record) -> dict[str, Any]:
    whole = record.choice("model_type", KINDS) == "aimv2"
    beside = ("projection_dim", "logit_scale_init_value", "max_logit_scale", "initializer_factor")
    vision = hf.tower(record, whole, "aimv2_vision_model", *beside)
    names: dict[str, Any] = {"dropout": "attention_dropout", "hidden_dropout": None, "eps_name": "rms_norm_eps"}
    arch = hf.sizes(vision, eps=1e-5, patch=14, dim=1024, depth=24, heads=8, hidden=2816, act="silu", **names)
    arch["qkv_bias"] = arch["proj_bias"] = vision.boolean("qkv_bias", False)
    if vision.boolean("mlp_bias", False) != arch["qkv_bias"]:
        vision.refuse("mlp_bias", "as qkv_bias: all layers of a block have a bias, or none")
    if vision.boolean("is_native", False):
        vision.refuse("is_native", "false: this model has no such part")
    hf.ignore(vision, "use_head")
    if whole:
        hf.finish(vision)
    return arch | {"num_classes": 0}


LAYOUT = Layout(
    name="transformers AIMv2",
    marks=("embeddings.patch_embed.weight",),
    rules=(
        to("embeddings.patch_embed.{w}", "patch_embed.proj.{w}"),
        to("embeddings.rms_norm.weight", "patch_embed.norm.weight"),
        to("embeddings.position_embedding.weight", "pos_embed", as_batch_of_one),
        to([f"{_BLOCK}attention.{p}_proj.{{w}}" for p in "qkv"], "blocks.{n}.attn.qkv.{w}"),
        to(_BLOCK + "attention.out_proj.{w}", "blocks.{n}.attn.proj.{w}"),
        to(_BLOCK + "rms_norm{i}.weight", "blocks.{n}.norm{i}.weight"),
        to(_BLOCK + "ffn.gate_proj.{w}", "blocks.{n}.mlp.fc1_g.{w}"),
        to(_BLOCK + "ffn.up_proj.{w}", "blocks.{n}.mlp.fc1_x.{w}"),
        to(_BLOCK + "ffn.down_proj.{w}", "blocks.{n}.mlp.fc2.{w}"),
        to("rms_norm.weight", "norm.weight"),
    ),
    dropped={
        r"head\..*": "an attention pool that timm's AIMv2 does not have: the mean of the patches is read",
        r"embeddings\.position_ids": "numbers of the positions",
        r"visual_projection\.weight": "the projection behind the attention pool",
        **TEXT,
    },
    outside={**TEXT, r"visual_projection\.weight": "the projection behind the attention pool"},
    base="aimv2_large_patch14_224",
    implied={"norm_eps": 1e-5},
    model_types=KINDS,
    configure=configure,
)
