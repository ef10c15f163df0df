"""Meta's own DINOv3: `storage_tokens`, one bias of q, k and v with a mask on k's part, rotary periods in bfloat16."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..layout import Converted, Layout, to
from .timm import LAYOUT as TIMM
from .transformers_dinov3 import gated


def without_keys(tensor: Tensor) -> tuple[Tensor, Tensor]:
    third = len(tensor) // 3
    return tensor[:third].contiguous(), tensor[2 * third :].contiguous()


def _finish(result: Converted) -> None:
    implied: dict[str, Any] = {"norm_eps": 1e-5, "num_reg_tokens": 0}
    if (registers := result.state.get("reg_token")) is not None:
        implied["num_reg_tokens"] = registers.shape[1]
    if gates := [value for key, value in result.state.items() if ".fc1_g." in key]:
        implied |= gated(len(gates[0]))
    result.implied |= implied


LAYOUT = Layout(
    name="DINOv3",
    marks=("patch_embed.proj.weight",),
    needs=("storage_tokens", "rope_embed.periods", "blocks.{n}.attn.qkv.bias_mask"),
    rules=(
        to("storage_tokens", "reg_token"),
        to("blocks.{n}.ls{i}.gamma", "blocks.{n}.gamma_{i}"),
        to("blocks.{n}.attn.qkv.bias", ("blocks.{n}.attn.q_bias", "blocks.{n}.attn.v_bias"), without_keys),
        to("blocks.{n}.mlp.w1.{w}", "blocks.{n}.mlp.fc1_g.{w}"),
        to("blocks.{n}.mlp.w2.{w}", "blocks.{n}.mlp.fc1_x.{w}"),
        to("blocks.{n}.mlp.w3.{w}", "blocks.{n}.mlp.fc2.{w}"),
    ),
    dropped={
        r"rope_embed\.periods": "rotary periods in bfloat16: they are computed in float32",
        r".*\.bias_mask": "the mask of the keys' bias, which is not kept at all",
        r"local_cls_norm\..*": "the norm of small crops in pretraining",
        r"projectors\..*": "projections of a distillation",
        **TIMM.dropped,
    },
    base="vit_base_patch16_dinov3",
    finish=_finish,
)
