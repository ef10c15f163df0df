"""torchvision.models.vit_*: the same tensors under other names."""

from __future__ import annotations

from ..layout import Converted, Layout, to

_BLOCK = "encoder.layers.encoder_layer_{n}"


def _representation(result: Converted) -> None:
    if (hidden := result.state.get("pre_logits.fc.bias")) is not None:
        result.implied["representation_size"] = len(hidden)


LAYOUT = Layout(
    name="torchvision",
    marks=("conv_proj.weight",),
    needs=("encoder.pos_embedding",),
    rules=(
        to("class_token", "cls_token"),
        to("conv_proj.{w}", "patch_embed.proj.{w}"),
        to("encoder.pos_embedding", "pos_embed"),
        to("encoder.ln.{w}", "norm.{w}"),
        to("heads.pre_logits.{w}", "pre_logits.fc.{w}"),
        to("heads.head.{w}", "head.{w}"),
        to(f"{_BLOCK}.ln_{{i}}.{{w}}", "blocks.{n}.norm{i}.{w}"),
        to(f"{_BLOCK}.self_attention.in_proj_{{w}}", "blocks.{n}.attn.qkv.{w}"),
        to(f"{_BLOCK}.self_attention.out_proj.{{w}}", "blocks.{n}.attn.proj.{w}"),
        to(f"{_BLOCK}.mlp.0.{{w}}", "blocks.{n}.mlp.fc1.{w}"),
        to(f"{_BLOCK}.mlp.3.{{w}}", "blocks.{n}.mlp.fc2.{w}"),
        to(f"{_BLOCK}.mlp.linear_{{i}}.{{w}}", "blocks.{n}.mlp.fc{i}.{w}"),
    ),
    finish=_representation,
)
