"""transformers' DINOv2, with and without registers.

With registers the class token's position is added into the token: timm's model has positions of patches only. The
gated MLP is one matrix, gate first, in files, and `gate_proj`, `up_proj` in models of transformers 5 in memory.
"""

from __future__ import annotations

from typing import Any

from ...support.records import Record
from .. import transformers_config as hf
from ..layout import Converted, Layout, Mapped, to

KINDS = ("dinov2", "dinov2_with_registers")
_BLOCK = "encoder.layer.{n}."


def configure(record: Record) -> dict[str, Any]:
    kind = record.choice("model_type", KINDS)
    arch = hf.sizes(record, eps=1e-6, patch=14 if kind == "dinov2" else 16, hidden=None)
    arch["qkv_bias"] = record.boolean("qkv_bias", True)
    hidden = int(arch["embed_dim"] * record.number("mlp_ratio", 4, low=0.0, high=1e6))
    if record.boolean("use_swiglu_ffn", False):  # SiLU whatever hidden_act says
        hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
        arch |= {"mlp_layer": "swiglu_packed", "act_layer": "silu"}
    arch["mlp_ratio"] = hf.ratio(hidden, arch["embed_dim"])
    arch["init_values"] = record.number("layerscale_value", 1.0)
    if kind != "dinov2":
        arch |= {"reg_tokens": record.integer("num_register_tokens", 4, 0), "no_embed_class": True}
    rate = record.number("drop_path_rate", 0.0, 0.0, 1.0)
    hf.ignore(record, "use_mask_token", "intermediate_size")  # transformers itself takes the width from mlp_ratio
    hf.backbone(record)
    return arch | ({"drop_path_rate": rate} if rate else {})


def fold_class_position(result: Converted) -> None:
    """Registers have no positions, and in timm's model neither has the class token: its position is added to it."""
    state = result.state
    if "reg_token" not in state or "pos_embed" not in state or "cls_token" not in state:
        return
    positions, token = state["pos_embed"], state["cls_token"]
    state["cls_token"] = (token.float() + positions[:, :1].float()).to(token.dtype)
    state["pos_embed"] = positions[:, 1:].contiguous()
    (source,) = next(one.sources for one in result.mapped if one.targets == ("pos_embed",))
    result.mapped.append(Mapped((f"{source}[0]",), ("cls_token",), "added to the class token"))
    result.implied |= {"no_embed_class": True, "reg_tokens": state["reg_token"].shape[1]}


def _finish(result: Converted) -> None:
    fold_class_position(result)
    first, second = (result.state.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    if first is not None and second is not None and second.ndim == 2 and len(first) == 2 * second.shape[1]:
        result.implied |= {"mlp_layer": "swiglu_packed", "act_layer": "silu"}
        result.base = "vit_giant_patch14_dinov2"


LAYOUT = Layout(
    name="transformers DINOv2",
    marks=("embeddings.patch_embeddings.projection.weight",),
    needs=(_BLOCK + "layer_scale{i}.lambda1",),
    rules=(
        to("embeddings.cls_token", "cls_token"),
        to("embeddings.register_tokens", "reg_token"),
        to("embeddings.position_embeddings", "pos_embed"),
        to("embeddings.patch_embeddings.projection.{w}", "patch_embed.proj.{w}"),
        *hf.attention(_BLOCK),
        to(_BLOCK + "norm{i}.{w}", "blocks.{n}.norm{i}.{w}"),
        to(_BLOCK + "layer_scale{i}.lambda1", "blocks.{n}.ls{i}.gamma"),
        to(_BLOCK + "mlp.fc{i}.{w}", "blocks.{n}.mlp.fc{i}.{w}"),
        to(_BLOCK + "mlp.weights_in.{w}", "blocks.{n}.mlp.fc1.{w}"),
        to((_BLOCK + "mlp.gate_proj.{w}", _BLOCK + "mlp.up_proj.{w}"), "blocks.{n}.mlp.fc1.{w}"),
        to(_BLOCK + "mlp.weights_out.{w}", "blocks.{n}.mlp.fc2.{w}"),
        to(_BLOCK + "mlp.down_proj.{w}", "blocks.{n}.mlp.fc2.{w}"),
        to("layernorm.{w}", "norm.{w}"),
        to("classifier.{w}", "head.{w}"),
    ),
    dropped={r"embeddings\.mask_token": "for pretraining by masked images"},
    implied={"norm_eps": 1e-6},
    base="vit_base_patch14_dinov2",
    finish=_finish,
    model_types=KINDS,
    configure=configure,
)
