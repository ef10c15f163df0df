"""Meta's own DINOv2: timm's names but for the gated MLP, registers and, in files of the training, blocks in chunks."""

from __future__ import annotations

from ..layout import Converted, Layout, to
from .timm import LAYOUT as TIMM
from .transformers_dinov2 import fold_class_position


def _finish(result: Converted) -> None:
    fold_class_position(result)
    if any(one.sources[0].endswith("mlp.w12.weight") for one in result.mapped):
        result.implied |= {"mlp_layer": "swiglu_packed", "act_layer": "silu"}
        result.base = "vit_giant_patch14_dinov2"


LAYOUT = Layout(
    name="DINOv2",
    marks=("patch_embed.proj.weight",),
    needs=("register_tokens", "blocks.{n}.mlp.w12.weight", "blocks.0.{n}.norm1.weight"),
    lacks=("blocks.{n}.attn.inner_attn_ln.weight", "storage_tokens", "blocks.{n}.attn.q_bias"),
    rules=(
        to("register_tokens", "reg_token"),
        to("blocks.{n}.mlp.w12.{w}", "blocks.{n}.mlp.fc1.{w}"),
        to("blocks.{n}.mlp.w3.{w}", "blocks.{n}.mlp.fc2.{w}"),
        to("blocks.{c}.{n}.mlp.w12.{w}", "blocks.{n}.mlp.fc1.{w}"),
        to("blocks.{c}.{n}.mlp.w3.{w}", "blocks.{n}.mlp.fc2.{w}"),
        to("blocks.{c}.{n}.{x}", "blocks.{n}.{x}"),
    ),
    dropped=TIMM.dropped,
    base="vit_base_patch14_dinov2",
    finish=_finish,
)
