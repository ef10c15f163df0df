"""NaFlexVit against timm: parameters, numbers at several sizes, what a forward calls."""

from __future__ import annotations

from typing import Any

import draw
import pytest
import timm
import torch
import vit
from conftest import USABLE
from test_plan import check
from torch import Tensor, nn

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 5, "img_size": (48, 80)}
NAMES = ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_par_gap", "naflexvit_base_patch16_siglip"]


def pair(name: str, backend: str = "reference", **arch: Any) -> tuple[nn.Module, nn.Module]:
    theirs = draw.fill(timm.create_model(name, **SMALL, **arch), 0.1).eval()
    ours = vit.create(name, backend=backend, device="cpu", **SMALL, **arch).eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def near(got: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert got.shape == expected.shape
    error, largest = (got - expected).abs().max(), expected.abs().max()
    assert error <= bound * largest, f"{error:.2g} of {largest:.2g}"


@pytest.mark.parametrize("size", [(48, 80), (256, 256), (112, 16)], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend_name", ["reference", *USABLE])
def test_logits_and_gradients_at_any_size(backend_name, name, size):
    theirs, ours = pair(name, backend_name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    image = draw.randn(2, 3, *size)
    found = []
    for model in (theirs, ours):
        x = image.clone().requires_grad_()
        logits = model(x)
        (logits * torch.linspace(0.5, 1, logits.numel()).view_as(logits)).sum().backward()
        found.append((logits, x.grad, model.embeds.pos_embed.grad, model.embeds.proj.weight.grad))
    near(found[1][0], found[0][0])
    for got, expected in zip(found[1][1:], found[0][1:], strict=True):
        near(got, expected, 2e-4)


def test_edges_are_padded_as_in_timm():
    theirs, ours = pair(NAMES[0], dynamic_img_pad=True)
    image = draw.randn(2, 3, 50, 70)
    near(ours(image), theirs(image))
    with pytest.raises(ValueError, match="50 x 70 is no multiple of the patch size 16 x 16"):
        pair(NAMES[0])[1](image)


def test_intermediates_are_grids_of_the_image():
    theirs, ours = pair(NAMES[0])
    image = draw.randn(1, 3, 32, 64)
    taken = ours.forward_intermediates(image, return_prefix_tokens=True, intermediates_only=True)
    wanted = theirs.forward_intermediates(image, return_prefix_tokens=True, intermediates_only=True)
    for (patches, prefix), (their_patches, their_prefix) in zip(taken, wanted, strict=True):
        assert patches.shape == (1, 48, 2, 4)
        near(patches, their_patches)
        near(prefix, their_prefix)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_forward_calls_is_what_was_planned(name):
    check(vit.create(name, backend="reference", **SMALL))


def test_weights_come_from_files_of_timm(tmp_path):
    theirs, _ = pair(NAMES[0])
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    loaded = vit.create(NAMES[0], backend="reference", weights=tmp_path / "weights.pt", **SMALL).eval()
    image = draw.randn(1, 3, 48, 80)
    near(loaded(image), theirs(image))
