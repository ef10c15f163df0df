"""A linear layer for each head, with rows [D, 3]: q, k and v of one channel beside each other. timm's are [3, H, D].

Names of github.com/Obafemi-Jinadu/VisionTransformer-Re-Implementation-from-Scratch (ViTClassifierHead.py), whose head
has a hidden layer with a tanh.
"""

from __future__ import annotations

import re

import torch

from ..layout import Converted, Layout, Mapped, to

_BLOCK = "backbone.encoders.{n}"
_HEADS = re.compile(r"blocks\.(\d+)\.attn\.heads\.(\d+)\.(weight|bias)")


def _join_heads(result: Converted) -> None:
    """The heads' layers of each block as the rows [3, H, D] of one."""
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for key in result.state:
        if match := _HEADS.fullmatch(key):
            groups.setdefault((match[1], match[3]), {})[int(match[2])] = key
    for (block, kind), heads in groups.items():
        keys = [heads[i] if i in heads else _lacking(block, i) for i in range(len(heads))]
        rows = [result.state.pop(key) for key in keys]
        apart = torch.stack([row.reshape(-1, 3, *row.shape[1:]) for row in rows])  # [H, D, 3, ...]
        target = f"blocks.{block}.attn.qkv.{kind}"
        result.state[target] = apart.transpose(0, 2).transpose(1, 2).reshape(-1, *rows[0].shape[1:])
        sources = tuple(source for one in result.mapped if one.targets[0] in keys for source in one.sources)
        result.mapped = [one for one in result.mapped if one.targets[0] not in keys]
        result.mapped.append(Mapped(sources, (target,), "stacked, q, k and v apart"))
        result.implied["num_heads"] = len(keys)
    if (hidden := result.state.get("pre_logits.fc.bias")) is not None:
        result.implied["representation_size"] = len(hidden)


def _lacking(block: str, head: int) -> str:
    raise KeyError(f"backbone.encoders.{block}.msa.heads.{head}")


LAYOUT = Layout(
    name="heads apart",
    marks=("backbone.patch_embed.convProjection.weight",),
    needs=(f"{_BLOCK}.msa.heads.{{c}}.qkv.weight",),
    rules=(
        to("backbone.patch_embed.cls_embed", "cls_token"),
        to("backbone.patch_embed.pos_embed", "pos_embed"),
        to("backbone.patch_embed.convProjection.{w}", "patch_embed.proj.{w}"),
        to(f"{_BLOCK}.layernorm{{i}}.{{w}}", "blocks.{n}.norm{i}.{w}"),
        to(f"{_BLOCK}.msa.heads.{{c}}.qkv.{{w}}", "blocks.{n}.attn.heads.{c}.{w}"),
        to(f"{_BLOCK}.msa.proj_back.{{w}}", "blocks.{n}.attn.proj.{w}"),
        to(f"{_BLOCK}.mlp.fc.{{w}}", "blocks.{n}.mlp.fc1.{w}"),
        to(f"{_BLOCK}.mlp.fc2.{{w}}", "blocks.{n}.mlp.fc2.{w}"),
        to("layernorm.{w}", "norm.{w}"),
        to("hidden.{w}", "pre_logits.fc.{w}"),
        to("final_class.{w}", "head.{w}"),
    ),
    implied={"norm_eps": 1e-5},
    finish=_join_heads,
)
