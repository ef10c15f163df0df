"""The decoder in the head: PyTorch's convolutions, weights with and without it, and what it is refused with."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import draw
import pytest
import torch
import torch.nn.functional as F
import vit
from conftest import USABLE
from rounding import close
from vit.model.decoder import DecoderHead, Upsample
from vit.model.options import Options
from vit.weights import WeightsError
from vit.weights.write import save

SMALL: dict[str, Any] = {
    "img_size": (24, 32), "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3,
    "global_pool": "",
}  # fmt: skip


def small(**changes: Any) -> Any:
    torch.manual_seed(1)
    return vit.create("vit_tiny_patch16_224", **({"backend": "reference"} | SMALL | {"decoder": [12, 8]} | changes))


def test_a_stage_is_a_sub_pixel_convolution() -> None:
    stage = Upsample(Options(**SMALL), 5, 4).double()
    x = draw.randn(2, 3, 6, 5).double()
    filters = stage.conv.weight.view(16, 3, 3, 5).permute(0, 3, 1, 2)
    # pixel_shuffle has the channel before the place in the cell, a stage behind it
    order = torch.arange(16).view(4, 4).T.flatten()
    y = F.conv2d(x.permute(0, 3, 1, 2), filters[order], stage.conv.bias[order], padding=1)
    y = F.pixel_shuffle(y, 2).permute(0, 2, 3, 1)
    close(stage(x), F.gelu(stage.norm(y)))


def test_a_stage_holds_every_transposed_convolution_of_4_x_4() -> None:
    stage = Upsample(Options(**SMALL), 3, 2).double()
    stage.norm = stage.act = torch.nn.Identity()
    filters = draw.randn(3, 2, 4, 4).double()
    weight = torch.zeros(2, 2, 2, 3, 3, 3, dtype=torch.float64)  # place in the cell, channel, neighbour, input
    for down, right, i, j in itertools.product(range(2), repeat=4):
        place = (i + down, j + right)  # of neighbours: above and here for the upper row, here and below for the lower
        part = filters[:, :, down + 3 - 2 * place[0], right + 3 - 2 * place[1]]
        weight[down, right, :, place[0], place[1]] = part.T
    with torch.no_grad():
        stage.conv.weight.copy_(weight.flatten(0, 2).flatten(1))
        stage.conv.bias.zero_()
    x = draw.randn(1, 4, 5, 3).double()
    wanted = F.conv_transpose2d(x.permute(0, 3, 1, 2), filters, stride=2, padding=1)
    close(stage(x).permute(0, 3, 1, 2), wanted)


@pytest.mark.parametrize("name", ["reference", *USABLE])
def test_maps_are_finer_than_the_patches(name: str) -> None:
    model = small(backend=name, device="cpu")
    images = draw.randn(3, 3, 24, 32)
    maps = model(images)
    assert maps.shape == (3, 3, 12, 16)
    maps.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    if name != "reference":
        assert torch.equal(model(images)[:1], model(images[:1])), "an image does not depend on its batch"
    model.set_input_size((16, 16))
    assert model(images[:, :, :16, :16]).shape == (3, 3, 8, 8)


def test_eva_has_it_too() -> None:
    sizes = {"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 2, "global_pool": ""}
    model = vit.create("eva02_tiny_patch14_224", backend="reference", decoder=[8], **sizes)
    assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 2, 4, 4)


def test_weights_keep_it(tmp_path: Path) -> None:
    model, images = small(decoder=[8, 8]).eval(), draw.randn(1, 3, 24, 32)
    wanted = model(images)
    save(model, tmp_path)
    assert torch.equal(vit.create(weights=tmp_path, backend="reference").eval()(images), wanted)
    plain = {key: value for key, value in SMALL.items() if key not in ("global_pool", "num_classes")}
    for given in ({}, {"decoder": [8, 8], "global_pool": "", "num_classes": 3}):  # the names tell as much
        again = vit.create("vit_tiny_patch16_224", "reference", weights=model.state_dict(), **(plain | given)).eval()
        assert torch.equal(again(images), wanted)
    other = vit.create("vit_tiny_patch16_224", "reference", weights=model.state_dict(), **plain, num_classes=5)
    assert other.head.weight.shape == (5, 8)
    assert other.options.decoder == (8, 8), "another number of classes has a new head of the same kind"


def test_a_classifier_becomes_a_backbone() -> None:
    classifier = small(decoder=[], global_pool="token", num_classes=7)
    model = small(weights=classifier.state_dict())
    assert isinstance(model.head, DecoderHead)
    assert torch.equal(model.blocks[0].attn.qkv.weight, classifier.blocks[0].attn.qkv.weight)
    assert "head.weight: a head without the decoder" in str(model.load_report)
    draw.check_deviation(model.head.stages[0].conv.weight, 0.02, "drawn anew")
    with pytest.raises(WeightsError, match="no classifier head"):  # who asks for no number of classes gets no new head
        vit.create(
            "vit_tiny_patch16_224", weights=classifier.state_dict(), **(SMALL | {"num_classes": None, "decoder": [8]})
        )


def test_what_it_does_not_go_with() -> None:
    for changes, text in (
        ({"decoder": [0]}, "list of numbers of channels from 1"),
        ({"decoder": 8}, "list of numbers of channels from 1"),
        ({"decoder": [8] * 6}, "6 stages, .* 5 are the most"),
        ({"global_pool": "avg"}, "global_pool must be ''"),
        ({"dynamic_img_size": True}, "no dynamic_img_size"),
        ({"patch_drop_rate": 0.5}, "no patch_drop_rate"),
    ):
        with pytest.raises(ValueError, match=text):
            small(**changes)
    with pytest.raises(vit.BackendError, match="decoder"):
        vit.Engine(small(backend="auto").eval())
