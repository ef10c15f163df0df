"""docs/add-a-part.md: an option, a data source, a weight layout and a command, added to a copy of the tree and used."""

from __future__ import annotations

from pathlib import Path

import pages
import pytest

OPTION = """
import torch, vit
from vit.engine.accepts import refusals
sizes = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, global_pool="avg")
model = vit.VisionTransformer(**sizes, block_norm=True, backend="reference").eval()
images = torch.arange(2 * 3 * 16 * 16, dtype=torch.float32).view(2, 3, 16, 16).sin()
rows = []
fused = model(images)
model.blocks[0].norm3.register_forward_hook(lambda module, inputs, tokens: rows.append(tokens))
torch.testing.assert_close(model(images), fused)  # the same op, on the same tokens; PyTorch's default for float32
print(abs(float(rows[0].mean(-1).max())) < 1e-6, [name for name in model.state_dict() if "norm3" in name][:1])
print("block_norm=True" in next(refusals(model)))
print(len(vit.VisionTransformer(**sizes, backend="reference").blocks[0].state_dict()))
"""

SOURCE = """
from pathlib import Path
from vit.data import kind_of, open_source
Path("set").mkdir()
Path("set/dark.hex").write_text("00010203 04050607")
Path("set/light.hex").write_text("fffefdfc")
source = open_source("set")
train = source.splits["train"]
print(kind_of("set"), source.class_names, train.labels.tolist(), train.images[2].tolist())
"""

LAYOUT = """
import re, torch, vit
from safetensors.torch import save_file
sizes = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
model = vit.create("vit_tiny_patch16_224", backend="reference", **sizes).eval()
names = {"patch_embed.proj": "stem", "cls_token": "class", "pos_embed": "positions", "head": "logits"}
names |= {"blocks": "layers", "attn.qkv": "qkv", "attn.proj": "out", "mlp.": ""}
def theirs(name):
    for ours, other in names.items():
        name = name.replace(ours, other)
    return name
state = {}
for name, tensor in model.state_dict().items():
    dense = re.search("qkv|proj|fc|head", name) and tensor.dim() == 2
    state[theirs(name)] = (tensor.T if dense else tensor).contiguous()
save_file(state, "weights.safetensors")
again = vit.create("vit_tiny_patch16_224", backend="reference", weights="weights.safetensors", **sizes).eval()
images = torch.ones(1, 3, 16, 16)
print(vit.weights.report(again).layout, torch.equal(model(images), again(images)))
"""


def parameters(tree: Path) -> str:
    return pages.python(tree, "-m", "vit", "count", "vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("section", "new", "edited", "program", "told"),
    [
        ("An option of the architecture", 0, 4, OPTION, "True ['blocks.0.norm3.weight']\nTrue\n12\n"),
        ("A data source", 1, 0, SOURCE, "hex_lines ('dark', 'light') [0, 0, 1] [[255, 254], [253, 252]]\n"),
        ("A weight layout", 1, 0, LAYOUT, "stem and layers True\n"),
        ("A command", 1, 1, "from vit.cli import main; main(['count', 'vit_tiny_patch16_224'])", "5717416\n"),
    ],
    ids=["option", "source", "layout", "command"],
)
def test_the_page_adds_it(tmp_path: Path, section: str, new: int, edited: int, program: str, told: str) -> None:
    tree = pages.copy_tree(tmp_path)
    changed = pages.follow("add-a-part.md", tree, section)
    assert (len(changed.new), len(changed.edited)) == (new, edited)
    assert pages.python(tree, "-c", program) == told
