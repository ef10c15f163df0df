"""transformers' ViT, DeiT, ViT-MAE, I-JEPA and ViT-MSN: q, k and v kept apart.

Two sets of names: files of the hub have `encoder.layer.N.attention.attention.query`, models of transformers 5 in memory
`layers.N.attention.q_proj`.

DeiT always has a distillation token. With a classifier for each token it is timm's distilled model; with one for the
class token, or none, the second token is a register with a position of its own.
"""

from __future__ import annotations

from typing import Any

from ...support.records import Record
from .. import transformers_config as hf
from ..layout import Converted, Layout, to

KINDS = {"vit": "ViT", "deit": "DeiT", "vit_mae": "ViTMAE", "ijepa": "IJepa", "vit_msn": "ViTMSN"}


def configure(record: Record) -> dict[str, Any]:
    kind = record.choice("model_type", KINDS)
    arch = hf.sizes(record, eps=1e-6 if kind == "vit_msn" else 1e-12)
    arch["qkv_bias"] = record.boolean("qkv_bias", True)
    hf.ignore(record, "encoder_stride", "pooler_act", "pooler_output_size")
    if kind == "vit_mae":
        hf.ignore(record, "decoder_num_attention_heads", "decoder_hidden_size", "decoder_num_hidden_layers")
        hf.ignore(record, "decoder_intermediate_size", "mask_ratio", "norm_pix_loss")
    if kind == "ijepa":
        arch |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return arch


def _second_token(result: Converted) -> None:
    if "dist_token" not in result.state:
        return
    if "head_dist.weight" in result.state:
        result.base = "deit_base_distilled_patch16_224"
        return
    result.state["reg_token"] = result.state.pop("dist_token")
    result.mapped = [
        type(one)(one.sources, ("reg_token",), "as a register") if one.targets == ("dist_token",) else one
        for one in result.mapped
    ]
    result.implied["reg_tokens"] = 1


LAYOUT = Layout(
    name="transformers ViT",
    marks=("embeddings.patch_embeddings.projection.weight",),
    lacks=("encoder.layer.{n}.layer_scale{i}.lambda1",),
    rules=(
        to("embeddings.cls_token", "cls_token"),
        to("embeddings.distillation_token", "dist_token"),
        to("embeddings.position_embeddings", "pos_embed"),
        to("embeddings.patch_embeddings.projection.{w}", "patch_embed.proj.{w}"),
        *hf.attention("encoder.layer.{n}."),
        to("encoder.layer.{n}.intermediate.dense.{w}", "blocks.{n}.mlp.fc1.{w}"),
        to("encoder.layer.{n}.output.dense.{w}", "blocks.{n}.mlp.fc2.{w}"),
        *(
            one
            for block in ("encoder.layer.{n}.", "layers.{n}.")
            for one in (
                to(block + "layernorm_before.{w}", "blocks.{n}.norm1.{w}"),
                to(block + "layernorm_after.{w}", "blocks.{n}.norm2.{w}"),
            )
        ),
        *hf.attention("layers.{n}."),
        to("layers.{n}.mlp.fc{i}.{w}", "blocks.{n}.mlp.fc{i}.{w}"),
        to("layernorm.{w}", "norm.{w}"),
        to("classifier.{w}", "head.{w}"),
        to("cls_classifier.{w}", "head.{w}"),
        to("distillation_classifier.{w}", "head_dist.{w}"),
    ),
    dropped={
        r"pooler\..*": "transformers' pooler, which no class depends on",
        r"embeddings\.mask_token": "for pretraining by masked images",
        r"decoder\..*": "for pretraining by masked images",
    },
    implied={"norm_eps": 1e-12},
    base="vit_base_patch16_224",
    finish=_second_token,
    model_types=tuple(KINDS),
    configure=configure,
)
