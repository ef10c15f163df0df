"""Engines of models that take images of any size: batches and lists of several sizes, and what is refused."""

from __future__ import annotations

from typing import Any

import draw
import pytest
import torch
import vit
from rounding import close
from torch import Tensor
from vit.backends import get

pytestmark = pytest.mark.skipif(get("cpu").unavailable() is not None, reason="the cpu backend is not built")

SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 5}
#: One of every way to positions: learned and resampled, of a grid, with class positions, rotary of all kinds, none.
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"dynamic_img_size": True},
    "vit_small_patch14_reg4_dinov2": {"dynamic_img_size": True, "patch_size": 16},
    "deit_tiny_distilled_patch16_224": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "vit_base_patch16_siglip_224": {"dynamic_img_size": True},
    "eva02_tiny_patch14_224": {"dynamic_img_size": True, "patch_size": 16},
    "vit_small_patch16_dinov3": {"dynamic_img_size": True},
    "vit_small_patch16_rope_mixed_224": {"dynamic_img_size": True},
    "naflexvit_base_patch16_siglip": {},
    "naflexvit_base_patch16_par_gap": {},
}
SIZES = ((64, 96), (32, 32), (64, 96), (112, 48), (96, 64), (32, 32))


def make(name: str, **more: Any) -> Any:
    arch = SMALL | {"img_size": 64} | MODELS[name] | more
    return draw.fill(vit.create(name, device="cpu", training=False, **arch), 0.1)


def mixed() -> list[Tensor]:
    return [draw.randn(3, *size) for size in SIZES]


@pytest.mark.parametrize("name", MODELS)
def test_a_list_gives_the_models_results(name):
    model, images = make(name), mixed()
    engine = vit.Engine(model)
    with torch.no_grad():
        close(engine(images), model(images), what="logits")
        tokens = model.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)[1]
    found = engine(images, outputs=("logits", "features", "tokens.1"))
    assert torch.equal(found["logits"], engine(images))
    assert found["features"].shape[0] == len(images)
    patches = tokens[1][0] if model.num_prefix_tokens else tokens[1]
    for got, wanted in zip(found["tokens.1"], patches, strict=True):
        close(got[model.num_prefix_tokens :], wanted, what="tokens")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "naflexvit_base_patch16_siglip"])
def test_each_image_equals_its_lone_run_to_the_bit(name, dtype):
    engine = vit.Engine(make(name), dtype, num_threads=2)
    for images in (mixed(), [(image * 20 + 128).clamp(0, 255).to(torch.uint8) for image in mixed()]):
        both = engine(images, outputs=("logits", "tokens.0"))
        for i, image in enumerate(images):
            alone = engine(image[None], outputs=("logits", "tokens.0"))
            assert torch.equal(both["logits"][i], alone["logits"][0])
            assert torch.equal(both["tokens.0"][i], alone["tokens.0"][0])
        last = [image.permute(1, 2, 0) for image in images]
        assert torch.equal(engine(last, layout="NHWC"), both["logits"])
        assert torch.equal(engine.submit(images).result(60), both["logits"])


def test_an_engine_of_another_size_gives_the_same_bits():
    """What was computed at construction is computed for a size that comes later."""
    model, images = make("vit_small_patch16_dinov3"), draw.randn(2, 3, 48, 80)
    found = vit.Engine(model)(images)
    model.set_input_size((48, 80))
    assert torch.equal(vit.Engine(model)(images), found)


def test_the_model_may_go_and_the_engine_keeps_its_positions():
    model, images = make("vit_tiny_patch16_224"), mixed()
    engine = vit.Engine(model)
    wanted = engine(images)
    with torch.no_grad():
        model.pos_embed.zero_()
    engine._grids.of.cache_clear()
    assert torch.equal(engine(images), wanted)


def test_attention_and_profile_of_another_size():
    engine = vit.Engine(make("vit_tiny_patch16_224"))
    images = draw.randn(2, 3, 32, 48)
    rows = engine(list(images), outputs="attention.1")
    assert [row.shape for row in rows] == [(3, 7), (3, 7)]
    close(torch.stack(rows).sum(-1), torch.ones(2, 3))
    flops = {size: sum(p.flops for p in engine.profile(draw.randn(1, 3, *size), 1)) for size in ((64, 64), (32, 32))}
    assert flops[32, 32] < flops[64, 64] / 3


def test_refusals(tmp_path):
    images = mixed()
    fixed = vit.Engine(draw.fill(vit.create("vit_tiny_patch16_224", training=False, **SMALL, img_size=64), 0.1))
    own = list(draw.randn(2, 3, 64, 64))
    assert torch.equal(fixed(own), fixed(torch.stack(own)))
    with pytest.raises(ValueError, match=r"images\[0\] is 64 x 96, the engine takes 64 x 64; .* dynamic_img_size=True"):
        fixed(images)
    engine = vit.Engine(make("naflexvit_base_patch16_siglip", max_num_patches=20))
    with pytest.raises(ValueError, match=r"image of 64 x 96 has 24 patches of 16 x 16, above max_num_patches=20"):
        engine(images)
    with pytest.raises(vit.BackendError, match="max_num_patches=8: images of its own size have 16 patches"):
        vit.Engine(make("naflexvit_base_patch16_siglip", max_num_patches=8))
    with pytest.raises(ValueError, match="the list of images is empty"):
        engine([])
    with pytest.raises(ValueError, match=r"each image has 3 dimensions, images\[1\] has \[1, 3, 32, 32\]"):
        engine([images[1], images[1][None]])
    with pytest.raises(TypeError, match="must be a tensor or a NumPy array, got str"):
        engine(["photo.jpg"])
    with pytest.raises(ValueError, match="out goes with a batch of images"):
        engine(images[:1], out=torch.empty(1, 5))
    with pytest.raises(ValueError, match="profile takes a batch"):
        engine.profile(images)
    with pytest.raises(ValueError, match="no multiple of the patch size"):
        vit.Engine(make("vit_tiny_patch16_224"))(draw.randn(1, 3, 40, 64))
    engine.save(tmp_path / "model.vit")
    with pytest.raises(ValueError, match="images are 32 x 32, the engine takes 64 x 64"):
        vit.Engine.load(tmp_path / "model.vit")(images[1][None])
    with pytest.raises(ValueError, match=r"images\[0\] is 64 x 96"):
        vit.Engine.load(tmp_path / "model.vit")(images)
