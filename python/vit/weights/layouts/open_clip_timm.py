"""open_clip around a tower of timm's: `visual.trunk.*` under timm's names, the projection in `visual.head`."""

from __future__ import annotations

from ..layout import Layout, to, with_zero_bias
from .openai_clip import TEXT
from .timm import LAYOUT as TIMM

LAYOUT = Layout(
    name="open_clip with timm's tower",
    marks=("trunk.patch_embed.proj.weight",),
    rules=(
        to("trunk.{x}", "{x}"),
        to("head.proj.weight", ("head.weight", "head.bias"), with_zero_bias),
        to("head.proj.{w}", "head.{w}"),
    ),
    dropped={rf"trunk\.({name})": why for name, why in TIMM.dropped.items()},
    outside={**TEXT, r"text\..*": "the text tower"},
)
