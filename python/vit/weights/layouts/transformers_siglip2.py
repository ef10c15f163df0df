"""transformers' SigLIP 2 of any size (NaFlex): patches are rows of pixels in (row, column, channel) order.

timm has it as NaFlexVit, whose projection has the same order and whose positions are a grid.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ...support.records import Record
from .. import transformers_config as hf
from ..layout import Layout, to
from .transformers_clip import TEXT, blocks
from .transformers_siglip import HEAD, ends, finish

KINDS = ("siglip2", "siglip2_vision_model")


def configure(record: Record) -> dict[str, Any]:
    whole = record.choice("model_type", KINDS) == "siglip2"
    vision = hf.tower(record, whole, "siglip2_vision_model", "initializer_factor")
    names = {"dropout": "attention_dropout", "hidden_dropout": None}
    arch = hf.sizes(vision, eps=1e-6, image=None, act="gelu_pytorch_tanh", **names)
    side = math.isqrt(vision.integer("num_patches", 256, 1))
    if side**2 != vision.integer("num_patches", 256, 1):
        vision.refuse("num_patches", "a square number")
    arch["img_size"] = (side * arch["patch_size"][0], side * arch["patch_size"][1])
    return ends(record, vision, arch, whole)


def as_grid(table: Tensor) -> Tensor:
    side = math.isqrt(len(table))
    return table.reshape(1, side, side, -1)


LAYOUT = Layout(
    name="transformers SigLIP 2",
    marks=("embeddings.patch_embedding.weight",),
    needs=("embeddings.patch_embedding.bias",),
    lacks=("embeddings.class_embedding",),
    ranks=(2,),
    rules=(
        to("embeddings.patch_embedding.{w}", "embeds.proj.{w}"),
        to("embeddings.position_embedding.weight", "embeds.pos_embed", as_grid),
        *blocks(),
        to("post_layernorm.{w}", "norm.{w}"),
        *HEAD,
        to("classifier.{w}", "head.{w}"),
    ),
    dropped=TEXT,
    outside=TEXT,
    base="naflexvit_base_patch16_siglip",
    implied={"norm_eps": 1e-6, "act_layer": "gelu_tanh"},
    finish=finish,
    model_types=KINDS,
    configure=configure,
)
