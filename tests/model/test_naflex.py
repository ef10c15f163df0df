"""NaFlexVit against timm: parameters, numbers at several sizes, what a forward calls."""

from __future__ import annotations

import functools
from typing import Any

import draw
import pytest
import timm
import torch
import vit
from conftest import USABLE
from PIL import Image
from rounding import WIDE, close
from test_plan import check
from timm.data import create_transform
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import Patchify
from torch import Tensor, nn

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 5, "img_size": (48, 80)}
NAMES = ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_par_gap", "naflexvit_base_patch16_siglip"]


def pair(name: str, backend: str = "reference", **arch: Any) -> tuple[nn.Module, nn.Module]:
    theirs = draw.fill(timm.create_model(name, **SMALL, **arch), 0.1).eval()
    ours = vit.create(name, backend=backend, device="cpu", **SMALL, **arch).eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


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
    close(found[1], found[0], WIDE)


def test_patches_and_heads_may_have_norms_of_their_own(tmp_path):
    arch = {"embed_norm_layer": functools.partial(nn.LayerNorm, eps=1e-2), "scale_attn_inner_norm": True}
    theirs, ours = pair(NAMES[0], **arch, scale_mlp_norm=True, pos_embed="none")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    image = draw.randn(2, 3, 48, 80)
    close(ours(image), theirs(image), WIDE)
    close(vit.from_timm(theirs)(image), theirs(image), WIDE)
    written = vit.weights.save(ours, tmp_path)["model_args"]
    assert (written["scale_attn_inner_norm"], written["pos_embed"]) == (True, "none")  # NaFlexVitCfg's words
    close(vit.create(weights=tmp_path, backend="reference").eval()(image), ours(image))


def test_edges_are_padded_as_in_timm():
    theirs, ours = pair(NAMES[0], dynamic_img_pad=True)
    image = draw.randn(2, 3, 50, 70)
    close(ours(image), theirs(image), WIDE)
    with pytest.raises(ValueError, match="50 x 70 is no multiple of the patch size 16 x 16"):
        pair(NAMES[0])[1](image)


def test_intermediates_are_grids_of_the_image():
    theirs, ours = pair(NAMES[0])
    image = draw.randn(1, 3, 32, 64)
    taken = ours.forward_intermediates(image, return_prefix_tokens=True, intermediates_only=True)
    wanted = theirs.forward_intermediates(image, return_prefix_tokens=True, intermediates_only=True)
    for (patches, prefix), (their_patches, their_prefix) in zip(taken, wanted, strict=True):
        assert patches.shape == (1, 48, 2, 4)
        close(patches, their_patches, WIDE)
        close(prefix, their_prefix, WIDE)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_forward_calls_is_what_was_planned(name):
    check(vit.create(name, backend="reference", **SMALL))


def test_weights_come_from_files_of_timm(tmp_path):
    theirs, _ = pair(NAMES[0])
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    loaded = vit.create(NAMES[0], backend="reference", weights=tmp_path / "weights.pt", **SMALL).eval()
    image = draw.randn(1, 3, 48, 80)
    close(loaded(image), theirs(image), WIDE)


def batch_of(images: list[Tensor], length: int) -> dict[str, Any]:
    """What timm's loader gives a NaFlexVit."""
    return NaFlexCollator(length)([(Patchify(16)(image), 0) for image in images])[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend_name", ["reference", *USABLE])
def test_a_pack_equals_timms_patches_coordinates_and_mask(backend_name, name):
    theirs, ours = pair(name, backend_name)
    images = [draw.randn(3, *size) for size in ((48, 80), (256, 256), (112, 16), (16, 16))]
    batch = batch_of(images, 300)
    weights = torch.linspace(0.5, 1, 20).view(4, 5)
    patches = batch["patches"].requires_grad_()
    expected = theirs(batch)
    (expected * weights).sum().backward()
    leaves = [image.clone().requires_grad_() for image in images]
    logits = ours(leaves)
    (logits * weights).sum().backward()
    for i, leaf in enumerate(leaves):
        close(logits[i], expected[i], WIDE)
        found = Patchify(16)(leaf.grad)["patches"]
        close(found, patches.grad[i, : len(found)], WIDE)


@pytest.mark.parametrize("flat", [True, False])
def test_batches_of_timms_collator_are_taken(flat):
    theirs, ours = pair(NAMES[0])
    images = [draw.randn(3, *size) for size in ((48, 80), (32, 16))]
    batch = batch_of(images, 20)
    given = batch if flat else batch | {"patches": batch["patches"].unflatten(2, (16, 16, 3))}
    close(ours(given), theirs(batch), WIDE)
    assert torch.equal(ours(given), ours(images))
    expected = theirs.forward_features(**{key: value for key, value in batch.items() if key != "seq_len"})
    tokens = ours.forward_features(given)
    for i, own in enumerate(tokens):
        assert len(own) == 4 + batch["patch_valid"][i].sum()
        close(own, expected["patches"][i, : len(own)], WIDE)
    close(ours.forward_head(tokens), theirs(batch), WIDE)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"patch_coord": None}, "needs the tensor 'patch_coord', got NoneType"),
        ({"attn_mask": torch.ones(1)}, "has 'attn_mask', which is not used here"),
        ({"patches": torch.zeros(1, 6, 4)}, r"patches must be \[B, N, 768\] or .* got \[1, 6, 4\]"),
        ({"patch_valid": torch.ones(1, 5)}, r"patch_valid must be \[1, 6\], got \[1, 5\]"),
        ({"patch_valid": torch.zeros(1, 6)}, r"patch_valid\[0\] has no valid patch"),
        ({"patch_valid": torch.tensor([[1, 0, 1, 1, 1, 1]])}, "those that fill up come last"),
        ({"patch_valid": torch.tensor([[1, 1, 1, 1, 0, 0]])}, "4 patches of .* are not all of a 2 x 3 grid"),
    ],
)
def test_batches_that_say_something_else_are_refused_by_name(change, text):
    batch = batch_of([draw.randn(3, 32, 48)], 6)
    with pytest.raises((ValueError, TypeError), match=text):
        pair(NAMES[0])[1](batch | change)


def test_images_above_the_limit_are_refused_by_name():
    model = vit.create(NAMES[0], training=False, max_num_patches=8, **SMALL)
    made = model.preprocess(Image.new("RGB", (300, 200)))
    assert made.shape == (3, 32, 48)
    model([made, draw.randn(3, 16, 128)])
    with pytest.raises(ValueError, match=r"48 x 48 has 9 patches of 16 x 16, above max_num_patches=8"):
        model([made, draw.randn(3, 48, 48)])
    with pytest.raises(ValueError, match="above max_num_patches=8"):
        model(draw.randn(1, 3, 48, 48))
    with pytest.raises(ValueError, match="max_num_patches"):
        vit.create(NAMES[0], max_num_patches=0)


def test_the_limit_makes_the_images_of_timms_loader():
    model = vit.create(NAMES[2], training=False, max_num_patches=100, **SMALL | {"img_size": 64})
    theirs = create_transform(
        **{"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"},
        **{"crop_pct": 1.0, "naflex": True, "max_seq_len": 100, "patch_size": 16},
    )
    for size in ((300, 200), (37, 501), (40, 40)):
        pixels = (draw.rand(size[1], size[0], 3) * 255).to(torch.uint8).numpy()
        image = Image.fromarray(pixels)
        assert torch.equal(model.preprocess(image), theirs(image))


CHANGED: dict[str, dict[str, Any]] = {
    "grid": {"pos_embed_grid_size": (5, 7), "pos_embed_interp_mode": "bilinear", "pos_embed_antialias": False},
    "corners": {"pos_embed_interp_mode": "bilinear", "pos_embed_antialias": False, "pos_embed_align_corners": True},
    "parts": {"act_layer": "silu", "norm_layer": "rmsnorm", "class_token": True, "drop_path_rate": 0.1},
    "none": {"pos_embed": "none"},
    "classic": {"use_naflex": True},
}


@pytest.mark.parametrize("change", CHANGED)
def test_live_models_become_vits_with_the_same_parameters(change):
    name = "vit_base_patch16_clip_224" if change == "classic" else NAMES[0]
    theirs = draw.fill(timm.create_model(name, **(SMALL | {"img_size": 64} | CHANGED[change])), 0.1).eval()
    ours = vit.from_timm(theirs)
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    image = draw.randn(2, 3, 48, 80)
    close(ours(image), theirs(image), WIDE)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pos_embed": "factorized"}, "pos_embed='factorized'"),
        ({"rope_type": "axial"}, "blocks of the NaFlexVit are EvaBlocks"),
        ({"pos_embed_use_grid_sample": True}, "pos_embed_use_grid_sample is True"),
        ({"patchify_channels_last": False}, "channels_last is False"),
        ({"enable_patch_interpolator": True}, "supports_patch_interpolation is True"),
        ({"embed_proj_type": "conv"}, "embeds.flatten is True"),
    ],
)
def test_live_models_with_more_are_refused_by_name(change, text):
    with pytest.raises(vit.weights.WeightsError, match=text):
        vit.from_timm(timm.create_model(NAMES[0], **SMALL, **change))


@pytest.mark.parametrize("name", NAMES)
def test_folders_go_both_ways(name, tmp_path):
    small = {key: value for key, value in SMALL.items() if key != "img_size"}
    more = {} if name == NAMES[2] else {"pos_embed_grid_size": (5, 7), "pos_embed_interp_mode": "bilinear"}
    theirs = draw.fill(timm.create_model(name, **small, **more), 0.1).eval()
    timm.models.save_for_hf(theirs, tmp_path / "theirs", model_args=small | more, safe_serialization=True)
    ours = vit.create(weights=tmp_path / "theirs", training=False, max_num_patches=64)
    image = draw.randn(2, 3, 48, 80)
    close(ours(image), theirs(image), WIDE)
    vit.weights.save(ours, tmp_path / "ours")
    assert torch.equal(
        timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()(image), theirs(image)
    )
    again = vit.create(weights=tmp_path / "ours", training=False)
    assert again.options.resize_rule == ours.options.resize_rule
    assert torch.equal(again([image[0], image[1, :, :32]]), ours([image[0], image[1, :, :32]]))
    assert again.preprocess == ours.preprocess
    with pytest.raises(vit.weights.WeightsError, match=r"NaFlexVit.*pass the name"):
        vit.create(weights=tmp_path / "theirs" / "model.safetensors")
