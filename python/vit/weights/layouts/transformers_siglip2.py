"""transformers' SigLIP 2 of any size (NaFlex): patches are rows of pixels in (row, column, channel) order.

Each image alone is what SigLIP's model of dynamic size computes, with positions resized bilinearly and antialiased.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ...support.records import Record
from .. import transformers_config as hf
from ..layout import Layout, to
from .transformers_clip import TEXT, as_batch_of_one, blocks
from .transformers_siglip import HEAD, ends, finish

KINDS = ("siglip2", "siglip2_vision_model")


def configure(record: Record) -> dict[str, Any]:
    whole = record.choice("model_type", KINDS) == "siglip2"
    vision = hf.tower(record, whole, "siglip2_vision_model", "initializer_factor")
    names: dict[str, Any] = {"dropout": "attention_dropout", "hidden_dropout": None}
    arch = hf.sizes(vision, eps=1e-6, image=None, act="gelu_pytorch_tanh", **names)
    if arch["in_chans"] != 3:
        vision.refuse("num_channels", "3: patches are read as rows of (row, column, channel)")
    side = math.isqrt(vision.integer("num_patches", 256, 1))
    if side**2 != vision.integer("num_patches", 256, 1):
        vision.refuse("num_patches", "a square number")
    arch["img_size"] = (side * arch["patch_size"][0], side * arch["patch_size"][1])
    return ends(record, vision, arch, whole) | ANY_SIZE


ANY_SIZE = {"dynamic_img_size": True, "pos_resize": "bilinear-aa"}


def as_image(weight: Tensor) -> Tensor:
    """Rows of (row, column, channel) -> [C, 3, P, P]."""
    side = math.isqrt(weight.shape[1] // 3)
    return weight.reshape(len(weight), side, side, 3).permute(0, 3, 1, 2).contiguous()


LAYOUT = Layout(
    name="transformers SigLIP 2",
    marks=("embeddings.patch_embedding.weight",),
    needs=("embeddings.patch_embedding.bias",),
    lacks=("embeddings.class_embedding",),
    ranks=(2,),
    rules=(
        to("embeddings.patch_embedding.weight", "patch_embed.proj.weight", as_image),
        to("embeddings.patch_embedding.bias", "patch_embed.proj.bias"),
        to("embeddings.position_embedding.weight", "pos_embed", as_batch_of_one),
        *blocks(),
        to("post_layernorm.{w}", "norm.{w}"),
        *HEAD,
        to("classifier.{w}", "head.{w}"),
    ),
    dropped=TEXT,
    outside=TEXT,
    base="vit_base_patch16_siglip_256",
    implied={"norm_eps": 1e-6, "act_layer": "gelu_tanh", **ANY_SIZE},
    finish=finish,
    model_types=KINDS,
    configure=configure,
)
