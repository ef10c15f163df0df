"""The evaluation transform: timm's values to the last bit, from every kind of image."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import timm.data
import torch
import vit
from PIL import Image
from rounding import close
from vit.model.configs import CONFIGS
from vit.preprocess import INTERPOLATIONS, Preprocess, naflex_size
from vit.weights.transformers_processor import preprocess as image_processor


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth structure and noise: rounding and edges both show."""
    y, x = np.mgrid[:height, :width]
    wave = 127.5 + 100 * np.sin(x[..., None] / 7 + np.arange(3)) * np.cos(y[..., None] / 5)
    noise = np.random.default_rng(0).normal(0, 20, wave.shape)
    return Image.fromarray(np.clip(wave + noise, 0, 255).astype(np.uint8), "RGB").convert(mode)


SHAPES = [(224, 224), (300, 200), (200, 301), (1000, 37), (64, 64), (225, 224), (249, 248), (333, 777)]


@pytest.mark.parametrize(
    "settings",
    [
        {"img_size": 224, "crop_pct": 0.9},
        {"img_size": 384},
        {"img_size": 224, "crop_pct": 0.875, "interpolation": "bilinear"},
        {"img_size": (224, 160), "crop_pct": 0.9},
        {"img_size": (96, 224), "crop_pct": 0.95, "interpolation": "lanczos"},
        {"img_size": 225, "crop_pct": 0.9},
        {"img_size": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_timm(settings, shape):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = Preprocess(mean=mean, std=std, **settings)
    theirs = timm.data.create_transform(
        (3, *ours.img_size), mean=mean, std=std, interpolation=ours.interpolation, crop_pct=ours.crop_pct
    )
    image = picture(*shape)
    got = ours(image)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert torch.equal(got, theirs(image))


@pytest.mark.parametrize("name", [name for name in CONFIGS if timm.is_model(name)])
def test_named_models_have_timms_transform(name):
    expected = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    found = vit.create(name, backend="reference", device="meta").preprocess
    assert found.img_size == expected["input_size"][1:]
    for key in ("mean", "std", "interpolation", "crop_pct"):
        assert getattr(found, key) == expected[key], key


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_grey_models_take_any_image(interpolation):
    transform = Preprocess(8, 0.1307, 0.3081, interpolation, in_chans=1)
    grey = picture(30, 20, "L")
    expected = np.asarray(grey.resize((12, 8), INTERPOLATIONS[interpolation]), np.float32)[:, 2:10] / 255
    close(transform(grey)[0].numpy(), (expected - 0.1307) / 0.3081)
    assert transform(picture(30, 20)).shape == (1, 8, 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_eight_bit_mode_is_converted(mode):
    image = picture(40, 40, mode)
    transform = Preprocess(32)
    assert torch.equal(transform(image), transform(image.convert("RGB")))


@pytest.mark.parametrize("array", [np.full((40, 40), 1000, np.uint16), np.full((40, 40), 0.5, np.float32)])
def test_deeper_images_are_refused_instead_of_clipped(array):
    with pytest.raises(ValueError, match="more than 8 bits per pixel, and converting would clip it; scale it to"):
        Preprocess(32)(Image.fromarray(array))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"the image is {size[0]} x {size[1]} pixels, so there is nothing"):
        Preprocess(8)(Image.new("RGB", size))


def test_what_is_no_image():
    with pytest.raises(TypeError, match=r"takes a PIL image, got str; use Image.open\(path\)"):
        Preprocess(32)("cat.jpg")
    with pytest.raises(ValueError, match="cannot be made into 5 channels"):
        Preprocess(32, in_chans=5)(picture(32, 32))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"interpolation": "cubic"}, "interpolation 'cubic' is not one of nearest, bilinear, bicubic"),
        ({"crop_pct": 0.0}, "crop_pct must be above 0 and at most 1, got 0.0"),
        ({"crop_pct": 1.1}, "crop_pct must be above 0"),
        ({"img_size": 0}, "img_size must be positive, got .0, 0."),
        ({"std": 0.0}, "std must be positive"),
        ({"std": (0.5, float("nan"), 0.5)}, "std must be positive"),
        ({"std": (float("nan"), -1.0, 0.5)}, "std must be positive"),
        ({"std": float("inf")}, "must be finite"),
        ({"std": 1e-45}, "must be finite, and so must"),
        ({"mean": 1e20, "std": 1e-20}, "must be finite, and so must"),
        ({"mean": 1e39}, "must be finite"),
        ({"mean": (0.5, 0.5, float("nan"))}, "must be finite"),
        ({"mean": float("-inf")}, "must be finite"),
        ({"mean": (0.1, 0.2)}, r"mean has 2 values for 3 channel\(s\)"),
        ({"in_chans": 1, "std": (0.1, 0.2, 0.3)}, r"std has 3 values for 1 channel\(s\)"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings, words):
    with pytest.raises(ValueError, match=words):
        Preprocess(**({"img_size": 32} | settings))


def test_round_trip_through_json_and_pickle():
    transform = Preprocess((32, 48), (0.1, 0.2, 0.3), 0.5, "bilinear", 0.9)
    assert Preprocess.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    assert pickle.loads(pickle.dumps(transform)) == transform
    with pytest.raises(ValueError, match="unknown crop, sise; known are crop_mode, crop_pct"):
        Preprocess.from_dict({"img_size": 3, "crop": 1, "sise": 2})


def test_changed_channels_and_size_follow_the_model():
    model = vit.create("deit_tiny_patch16_224", backend="reference", device="meta", in_chans=1, img_size=(32, 64))
    assert model.preprocess.mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)
    assert model.preprocess(picture(50, 50)).shape == (1, 32, 64)
    model = vit.create("vit_digits", in_chans=3)
    assert model.preprocess(picture(50, 50)).shape == (3, 8, 8)


@pytest.mark.parametrize(("size", "fraction"), [((48, 32), 1.0), ((32, 32), 0.875), ((24, 40), 0.7)])
def test_squash_is_timms(size, fraction):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 77, 3), np.uint8))
    theirs = timm.data.create_transform((3, *size), crop_pct=fraction, crop_mode="squash", interpolation="bicubic")
    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    assert torch.equal(Preprocess(size, mean, std, "bicubic", fraction, crop_mode="squash")(image), theirs(image))
    with pytest.raises(ValueError, match="crop_mode 'pad' is not one of center, squash, border"):
        Preprocess(size, crop_mode="pad")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("img_size", "x"),
        ("img_size", [1.5, 2]),
        ("mean", None),
        ("std", ["1"]),
        ("std", [float("nan")]),
        ("crop_pct", []),
        ("interpolation", 3),
        ("in_chans", "3"),
        ("in_chans", 0),
        ("crop_mode", None),
        ("mean", []),
    ],
)
def test_values_of_another_kind_are_named(key, value):
    with pytest.raises(ValueError, match=f"preprocess: {key} "):
        Preprocess.from_dict({"img_size": 32, key: value})


# ---- the numbers of transformers' image processors ----

PROCESSORS = {
    "ViTImageProcessor": {},
    "ViTImageProcessor-wide": {"size": {"height": 40, "width": 56}, "resample": 3},
    "DeiTImageProcessor": {},
    "CLIPImageProcessor": {"size": {"shortest_edge": 100}, "crop_size": {"height": 90, "width": 90}},
    "BitImageProcessor": {"size": {"shortest_edge": 56}, "crop_size": {"height": 47, "width": 47}},
    "SiglipImageProcessor": {},
    "Siglip2ImageProcessor": {"max_num_patches": 40},
    "DINOv3ViTImageProcessor": {},
}


def photograph(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("name", PROCESSORS)
def test_image_processors_of_transformers_are_followed_bit_for_bit(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, name.partition("-")[0])(**PROCESSORS[name])
    processor.save_pretrained(tmp_path)
    ours = Preprocess(**{"img_size": 1, **image_processor(tmp_path / "preprocessor_config.json")})
    for image in (photograph(50, 71), photograph(301, 233), photograph(37, 37)):
        theirs, found = processor(image, return_tensors="pt"), ours(image)
        expected = theirs["pixel_values"][0]
        if name == "Siglip2ImageProcessor":
            rows, columns = theirs["spatial_shapes"][0].tolist()
            found = found.reshape(3, rows, 16, columns, 16).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
            expected = expected[: rows * columns]
        assert torch.equal(found, expected)
    assert Preprocess.from_dict(ours.to_dict()) == ours


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_crop_modes_are_timms(mode, size, interpolation):
    mean, std = timm.data.OPENAI_CLIP_MEAN, timm.data.OPENAI_CLIP_STD
    for fraction in (1.0, 0.9):
        settings = {"interpolation": interpolation, "mean": mean, "std": std, "crop_mode": mode, "crop_pct": fraction}
        theirs, ours = timm.data.create_transform((3, *size), **settings), Preprocess(size, **settings)
        for image in (photograph(50, 71), photograph(301, 133)):
            assert torch.equal(ours(image), theirs(image))


def test_sizes_of_naflex_are_timms():
    from timm.data.naflex_transforms import get_image_size_for_seq

    for height, width, patch, most in ((50, 71, 16, 256), (1000, 37, 14, 100), (3, 4000, 16, 64), (1, 1, 8, 1)):
        _, expected = get_image_size_for_seq((height, width), patch, most)
        assert naflex_size((width, height), patch, most) == expected[::-1]
