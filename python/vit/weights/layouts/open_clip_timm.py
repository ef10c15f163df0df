"""open_clip around a tower of timm's: `visual.trunk.*` under timm's names, the projection in `visual.head`."""

from __future__ import annotations

from ..layout import Converted, Layout, Mapped, to
from .openai_clip import TEXT
from .timm import LAYOUT as TIMM


def _bias_of_head(result: Converted) -> None:
    """A projection without a bias gets one of zeros, which timm's head has."""
    head = result.state.get("head.weight")
    if head is None or "head.bias" in result.state:
        return
    result.state["head.bias"] = head.new_zeros(len(head))
    result.mapped = [
        Mapped(one.sources, ("head.weight", "head.bias"), "with zero bias") if "head.weight" in one.targets else one
        for one in result.mapped
    ]


LAYOUT = Layout(
    name="open_clip with timm's tower",
    marks=("trunk.patch_embed.proj.weight",),
    rules=(
        to("trunk.{x}", "{x}"),
        to("head.proj.{w}", "head.{w}"),
    ),
    finish=_bias_of_head,
    dropped={rf"trunk\.({name})": why for name, why in TIMM.dropped.items()},
    outside={**TEXT, r"text\..*": "the text tower"},
)
