"""OpenAI's CLIP and open_clip's image tower of the same form: `visual.conv1`, `visual.transformer.resblocks`.

Whether the activation is quick-GELU stands in no tensor; it does for OpenAI's own files, which are TorchScript or
float16 with `input_resolution`, and in open_clip_config.json.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..layout import Converted, Layout, Mapped, to, transposed_with_zero_bias

TEXT = {
    r"(transformer|token_embedding|ln_final|text|positional_embedding|text_projection|attn_mask)\b.*": "the text tower",
    r"logit_(scale|bias)": "scale and bias of a contrastive loss",
    r"input_resolution|context_length|vocab_size": "a number of the program",
}
BLOCK = "transformer.resblocks.{n}."
BODY = (
    to("class_embedding", "cls_token", lambda one: one.reshape(1, 1, -1)),
    to("conv1.weight", "patch_embed.proj.weight"),
    to("positional_embedding", "pos_embed", lambda one: one[None]),
    to("ln_pre.{w}", "norm_pre.{w}"),
    to(BLOCK + "ln_{i}.{w}", "blocks.{n}.norm{i}.{w}"),
    to(BLOCK + "attn.in_proj_{w}", "blocks.{n}.attn.qkv.{w}"),
    to(BLOCK + "attn.out_proj.{w}", "blocks.{n}.attn.proj.{w}"),
    to(BLOCK + "mlp.c_fc.{w}", "blocks.{n}.mlp.fc1.{w}"),
    to(BLOCK + "mlp.c_proj.{w}", "blocks.{n}.mlp.fc2.{w}"),
    to("ln_post.{w}", "norm.{w}"),
    to("proj", ("head.weight", "head.bias"), transposed_with_zero_bias),
)


def is_clip(names: Collection[str]) -> bool:
    """Whether it is a tower of CLIP's: a Perception Encoder has attention pooling, or no last norm."""
    return "attn_pool.probe" not in names and "ln_post.weight" in names


def _finish(result: Converted) -> None:
    implied: dict[str, Any] = {"norm_eps": 1e-5, "pre_norm": True}
    if "norm_pre.weight" not in result.state and "patch_embed.proj.weight" in result.state:
        # CLIPA's, without a norm before the blocks: timm's patches have a bias then.
        implied["pre_norm"] = False
        weight = result.state["patch_embed.proj.weight"]
        result.state["patch_embed.proj.bias"] = weight.new_zeros(len(weight))
        result.mapped = [_with_bias(one) for one in result.mapped]
    if any(".ls1." in key for key in result.state):
        implied["init_values"] = 1e-5
    result.implied |= implied


def _with_bias(one: Mapped) -> Mapped:
    if one.targets != ("patch_embed.proj.weight",):
        return one
    return Mapped(one.sources, (*one.targets, "patch_embed.proj.bias"), "with zero bias")


LAYOUT = Layout(
    name="OpenAI CLIP",
    marks=("conv1.weight",),
    needs=("class_embedding",),
    told=is_clip,
    rules=(*BODY, to(BLOCK + "ls_{i}.gamma", "blocks.{n}.ls{i}.gamma")),
    outside=TEXT,
    base="vit_base_patch16_clip_224",
    finish=_finish,
)
