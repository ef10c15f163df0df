"""transformers' CLIP, and MetaCLIP 2, which is the same: the image tower alone, with its projection, below a text
tower, or with a classifier.

The classifier (CLIPForImageClassification) reads the mean of the patches before the last norm, which it does not use.
"""

from __future__ import annotations

from typing import Any

from ...support.records import Record
from .. import transformers_config as hf
from ..layout import Converted, Layout, to, with_zero_bias

KINDS = ("clip", "clip_vision_model", "metaclip_2", "metaclip_2_vision_model")
TEXT = {
    r"(text_model|text_embedding|text_projection)\b.*": "the text tower",
    r"logit_(scale|bias)": "scale and bias of a contrastive loss",
}


def configure(record: Record) -> dict[str, Any]:
    kind = record.choice("model_type", KINDS).removesuffix("_vision_model")
    whole = record.text("model_type") == kind
    vision = hf.tower(record, whole, f"{kind}_vision_model", "initializer_factor", "logit_scale_init_value")
    arch = hf.sizes(vision, eps=1e-5, patch=32, act="quick_gelu", dropout="attention_dropout", hidden_dropout=None)
    hf.ignore(vision, "initializer_factor", "dropout")
    projection = vision.integer("projection_dim", 512, 1)
    if whole:
        projection = record.integer("projection_dim", 512, 1)
        hf.finish(vision)
    classes = {name.replace("MetaClip2", "CLIP") for name in hf.classes_of(record)}
    if "CLIPForImageClassification" in classes:
        return arch | _CLASSIFIER
    if "CLIPVisionModel" in classes:
        projection = 0
    return arch | {"num_classes": projection}


_CLASSIFIER = {"global_pool": "avg", "final_norm": False, "fc_norm": False}


def _finish(result: Converted) -> None:
    if any(one.sources == ("classifier.weight",) for one in result.mapped):
        for key in ("norm.weight", "norm.bias"):
            result.drop(key, "a norm that the classifier does not use")
        result.implied |= _CLASSIFIER
    for key in ("head.weight", "head.bias"):
        if key in result.state and not any(key in one.targets for one in result.mapped):
            del result.state[key]


def blocks(prefix: str = "encoder.layers.{n}.") -> tuple[Any, ...]:
    """The blocks of CLIP and SigLIP."""
    return (
        to([f"{prefix}self_attn.{p}_proj.{{w}}" for p in "qkv"], "blocks.{n}.attn.qkv.{w}"),
        to(prefix + "self_attn.out_proj.{w}", "blocks.{n}.attn.proj.{w}"),
        to(prefix + "layer_norm{i}.{w}", "blocks.{n}.norm{i}.{w}"),
        to(prefix + "mlp.fc{i}.{w}", "blocks.{n}.mlp.fc{i}.{w}"),
    )


def as_batch_of_one(tensor: Any) -> Any:
    return tensor[None]


LAYOUT = Layout(
    name="transformers CLIP",
    marks=("embeddings.patch_embedding.weight",),
    needs=("embeddings.class_embedding",),
    rules=(
        to("embeddings.class_embedding", "cls_token", lambda one: one.reshape(1, 1, -1)),
        to("embeddings.patch_embedding.weight", "patch_embed.proj.weight"),
        to("embeddings.position_embedding.weight", "pos_embed", as_batch_of_one),
        to("pre_layrnorm.{w}", "norm_pre.{w}"),
        to("pre_layernorm.{w}", "norm_pre.{w}"),
        *blocks(),
        to("post_layernorm.{w}", "norm.{w}"),
        to("visual_projection.weight", ("head.weight", "head.bias"), with_zero_bias),
        to("classifier.{w}", "head.{w}"),
    ),
    dropped={r"embeddings\.position_ids": "numbers of the positions", **TEXT},
    outside={**TEXT, r"text_model\..*position_ids": "the text tower"},
    base="vit_base_patch16_clip_quickgelu_224",
    implied={"norm_eps": 1e-5, "pre_norm": True},
    finish=_finish,
    model_types=KINDS,
    configure=configure,
)
