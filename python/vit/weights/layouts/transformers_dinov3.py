"""transformers' DINOv3: rotary positions, LayerScale, registers, no bias of the keys."""

from __future__ import annotations

from typing import Any

from ...support.records import Record
from .. import transformers_config as hf
from ..layout import Converted, Layout, stacked, to


def gated(hidden: int) -> dict[str, Any]:
    """The arguments of a gated MLP of that width, which timm's models round up."""
    return {"swiglu_mlp": True, "swiglu_align_to": 1 if hidden % 8 else 8}


_BLOCKS = ("layer.{n}.", "model.layer.{n}.")  # files; models of transformers 5 in memory


def configure(record: Record) -> dict[str, Any]:
    record.choice("model_type", ("dinov3_vit",))
    arch = hf.sizes(record, eps=1e-5, dim=384, heads=6, hidden=1536, dropout="attention_dropout", hidden_dropout=None)
    act = arch.pop("act_layer")
    if record.boolean("use_gated_mlp", False):
        if act != "silu":
            record.refuse("hidden_act", "silu: the gate of this model's MLP is SwiGLU's")
        arch |= gated(int(arch["embed_dim"] * arch["mlp_ratio"]))
    elif act != "gelu":
        record.refuse("hidden_act", "gelu without use_gated_mlp")
    biases = {key: record.boolean(key, default) for key, default in _BIASES.items()}
    if biases["query_bias"] != biases["value_bias"]:
        record.refuse("value_bias", "as query_bias")
    for key, wanted in (("key_bias", False), ("proj_bias", True), ("mlp_bias", True)):
        if biases[key] is not wanted:
            record.refuse(key, str(wanted).lower())
    arch["qkv_bias"] = biases["query_bias"]
    arch["num_reg_tokens"] = record.integer("num_register_tokens", 0, 0)
    arch["init_values"] = record.number("layerscale_value", 1.0)
    arch["rope_temperature"] = record.number("rope_theta", 100.0, low=1e-6)
    if (parameters := record.record("rope_parameters", None)) is not None:
        arch["rope_temperature"] = parameters.number("rope_theta", arch["rope_temperature"], low=1e-6)
        parameters.choice("rope_type", ("default",), "default")
        parameters.finish()
    rate = record.number("drop_path_rate", 0.0, 0.0, 1.0)
    hf.ignore(record, "pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")  # of training alone
    hf.backbone(record)
    return arch | {"global_pool": "token"} | ({"drop_path_rate": rate} if rate else {})


_BIASES = {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True}


def _gated(result: Converted) -> None:
    """Beside a gate the projection is timm's second half of a gated MLP."""
    if gates := [value for key, value in result.state.items() if ".fc1_g." in key]:
        result.rename("blocks.{n}.mlp.fc1.{w}", "blocks.{n}.mlp.fc1_x.{w}")
        result.implied |= gated(len(gates[0]))


LAYOUT = Layout(
    name="transformers DINOv3",
    marks=("embeddings.patch_embeddings.weight",),
    rules=(
        to("embeddings.cls_token", "cls_token"),
        to("embeddings.register_tokens", "reg_token"),
        to("embeddings.patch_embeddings.{w}", "patch_embed.proj.{w}"),
        to("norm.{w}", "norm.{w}"),
        *(
            one
            for block in _BLOCKS
            for one in (
                to([f"{block}attention.{p}_proj.weight" for p in "qkv"], "blocks.{n}.attn.qkv.weight", stacked),
                to(block + "attention.q_proj.bias", "blocks.{n}.attn.q_bias"),
                to(block + "attention.v_proj.bias", "blocks.{n}.attn.v_bias"),
                to(block + "attention.o_proj.{w}", "blocks.{n}.attn.proj.{w}"),
                to(block + "norm{i}.{w}", "blocks.{n}.norm{i}.{w}"),
                to(block + "layer_scale{i}.lambda1", "blocks.{n}.gamma_{i}"),
                to(block + "mlp.gate_proj.{w}", "blocks.{n}.mlp.fc1_g.{w}"),
                to(block + "mlp.up_proj.{w}", "blocks.{n}.mlp.fc1.{w}"),
                to(block + "mlp.down_proj.{w}", "blocks.{n}.mlp.fc2.{w}"),
            )
        ),
    ),
    dropped={r"embeddings\.mask_token": "for pretraining by masked images"},
    finish=_gated,
    base="vit_base_patch16_dinov3",
    implied={"norm_eps": 1e-5, "global_pool": "token"},
    model_types=("dinov3_vit",),
    configure=configure,
)
