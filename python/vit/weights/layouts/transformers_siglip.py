"""transformers' SigLIP, and SigLIP 2 of a fixed size: no class token, attention pooling by one learned query.

The classifier (SiglipForImageClassification) reads the mean of the patches instead.
"""

from __future__ import annotations

from typing import Any

from ...support.records import Record
from .. import transformers_config as hf
from ..layout import Converted, Layout, split_query, to
from .transformers_clip import TEXT, as_batch_of_one, blocks

KINDS = ("siglip", "siglip_vision_model")
CLASSIFIER = {"global_pool": "avg", "fc_norm": False}
HEAD = (
    to("head.probe", "attn_pool.latent"),
    to("head.attention.in_proj_weight", ("attn_pool.q.weight", "attn_pool.kv.weight"), split_query),
    to("head.attention.in_proj_bias", ("attn_pool.q.bias", "attn_pool.kv.bias"), split_query),
    to("head.attention.out_proj.{w}", "attn_pool.proj.{w}"),
    to("head.layernorm.{w}", "attn_pool.norm.{w}"),
    to("head.mlp.fc{i}.{w}", "attn_pool.mlp.fc{i}.{w}"),
)


def configure(record: Record) -> dict[str, Any]:
    whole = record.choice("model_type", KINDS) == "siglip"
    vision = hf.tower(record, whole, "siglip_vision_model", "initializer_factor")
    arch = hf.sizes(vision, eps=1e-6, act="gelu_pytorch_tanh", dropout="attention_dropout", hidden_dropout=None)
    return ends(record, vision, arch, whole)


def ends(record: Record, vision: Record, arch: dict[str, Any], whole: bool) -> dict[str, Any]:
    """Pooling and classes, of SigLIP and SigLIP 2 alike."""
    arch |= {"class_token": False, "global_pool": "map"}
    if not vision.boolean("vision_use_head", True):
        arch |= CLASSIFIER
    hf.ignore(vision, "projection_size")
    if whole:
        hf.finish(vision)
    if any("ForImageClassification" in name for name in hf.classes_of(record)):
        return arch | CLASSIFIER
    return arch | {"num_classes": 0}


def finish(result: Converted) -> None:
    if "head.weight" in result.state:
        for key in [key for key in result.state if key.startswith("attn_pool.")]:
            result.drop(key, "the classifier reads the mean of the patches")
    result.implied |= {"class_token": False} | (
        {"global_pool": "map"} if "attn_pool.latent" in result.state else CLASSIFIER
    )


LAYOUT = Layout(
    name="transformers SigLIP",
    marks=("embeddings.patch_embedding.weight",),
    needs=("embeddings.patch_embedding.bias",),
    lacks=("embeddings.class_embedding",),
    ranks=(4,),
    rules=(
        to("embeddings.patch_embedding.{w}", "patch_embed.proj.{w}"),
        to("embeddings.position_embedding.weight", "pos_embed", as_batch_of_one),
        *blocks(),
        to("post_layernorm.{w}", "norm.{w}"),
        *HEAD,
        to("classifier.{w}", "head.{w}"),
    ),
    dropped={r"embeddings\.position_ids": "numbers of the positions", **TEXT},
    outside={**TEXT, r"text_model\..*": "the text tower"},
    base="vit_base_patch16_siglip_224",
    implied={"norm_eps": 1e-6, "act_layer": "gelu_tanh"},
    finish=finish,
    model_types=KINDS,
    configure=configure,
)
