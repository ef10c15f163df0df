"""NVIDIA's C-RADIO: one class token per teacher, then registers; positions of 128 x 128 patches."""

from __future__ import annotations

import math

from torch import Tensor

from ..layout import Layout, to


def as_image_with_zero_bias(weight: Tensor) -> tuple[Tensor, Tensor]:
    side = math.isqrt(weight.shape[1] // 3)
    return weight.reshape(len(weight), 3, side, side), weight.new_zeros(len(weight))


def first_and_the_rest(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens[None, :1].contiguous(), tokens[None, 1:].contiguous()


LAYOUT = Layout(
    name="C-RADIO",
    marks=("patch_generator.embedder.weight",),
    rules=(
        to(
            "patch_generator.embedder.weight",
            ("patch_embed.proj.weight", "patch_embed.proj.bias"),
            as_image_with_zero_bias,
        ),
        to("patch_generator.pos_embed", "pos_embed"),
        to("patch_generator.cls_token.token", ("cls_token", "reg_token"), first_and_the_rest),
        to("blocks.{n}.ls{i}.grandma", "blocks.{n}.ls{i}.gamma"),
    ),
    dropped={r"(head|norm)\..*": "what the model of the towers does not use"},
    outside={
        r".*(adaptor|teacher|summary_idxs|feature_normalizer|inter_feature).*": "heads of the teachers",
        r".*input_conditioner.*": "statistics of the images",
    },
    base="vit_base_patch16_radio_v3",
    implied={"norm_eps": 1e-6},
)
