"""Apple's own AIMv2: `preprocessor.patchifier`, `trunk`, the gate in `fc1` and its partner in `fc3`."""

from __future__ import annotations

from ..layout import Layout, to

LAYOUT = Layout(
    name="AIMv2",
    marks=("preprocessor.patchifier.proj.weight",),
    rules=(
        to("preprocessor.patchifier.{x}", "patch_embed.{x}"),
        to("preprocessor.pos_embed", "pos_embed"),
        to("trunk.blocks.{n}.norm_{i}.weight", "blocks.{n}.norm{i}.weight"),
        to("trunk.blocks.{n}.attn.{x}", "blocks.{n}.attn.{x}"),
        to("trunk.blocks.{n}.mlp.fc1.weight", "blocks.{n}.mlp.fc1_g.weight"),
        to("trunk.blocks.{n}.mlp.fc3.weight", "blocks.{n}.mlp.fc1_x.weight"),
        to("trunk.blocks.{n}.mlp.fc2.weight", "blocks.{n}.mlp.fc2.weight"),
        to("trunk.post_trunk_norm.weight", "norm.weight"),
    ),
    implied={"norm_eps": 1e-5},
    base="aimv2_large_patch14_224",
)
