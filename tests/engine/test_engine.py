"""vit.Engine: the same logits as the model for every option and name, and errors instead of crashes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import threading

import draw
import named
import numpy as np
import pytest
import torch
import vit
from conftest import USABLE
from rounding import WIDE, close
from torch import Tensor, nn
from vit.bench.cost import measure
from vit.bench.weights import seeded_state
from vit.preprocess import Preprocess
from vit.support.random import normal

pytestmark = pytest.mark.skipif("cpu" not in USABLE, reason="the cpu backend is not usable here")

SMALL = {
    **{"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10},
    **{"backend": "reference", "training": False},
}
OPTIONS = {
    "plain": {},
    "average": {"global_pool": "avg", "class_token": False},
    "average-with-token": {"global_pool": "avg"},
    "all-tokens": {"global_pool": ""},
    "all-tokens-no-head": {"global_pool": "", "num_classes": 0},
    "no-head": {"num_classes": 0},
    "no-positions": {"pos_embed": "none"},
    "fixed-positions": {"pos_embed": "sincos2d"},
    "rectangle": {"img_size": (24, 40), "patch_size": (8, 4)},
    "padded": {"img_size": (30, 29), "dynamic_pad": True},
    "linear-patches": {"patch_embed": "linear"},
    "tanh": {"act_layer": "gelu_tanh"},
    "no-qkv-bias": {"qkv_bias": False},
    "gray": {"in_chans": 1, "patch_size": 4},
    "seven-channels": {"in_chans": 7},
    "eps": {"norm_eps": 1e-3},
    "narrow": {"embed_dim": 12, "num_heads": 3, "mlp_ratio": 1.5},
    "wide-head": {"embed_dim": 160, "num_heads": 1},
    "odd-patch": {"img_size": 28, "patch_size": 7, "in_chans": 1},
    "many-tokens": {"img_size": 128, "patch_size": 4},
    "dropout": {"drop_rate": 0.5, "proj_drop_rate": 0.5, "drop_path_rate": 0.5, "pos_drop_rate": 0.5},
}
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def make(name: str = "vit_tiny_patch16_224", **arch) -> nn.Module:
    """A model on the reference with weights as uneven as trained ones."""
    model = vit.create(name, **(SMALL | arch))
    model.load_state_dict(seeded_state(model.state_dict()))
    return model


def images_for(model: nn.Module, batch: int = 3) -> Tensor:
    return draw.randn(batch, model.patch_embed.in_chans, *model.patch_embed.img_size)


def error(got: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value."""
    assert got.shape == truth.shape
    return ((got.double() - truth).abs().max() / truth.abs().max()).item()


def mean_error(got: Tensor, truth: Tensor) -> float:
    """Root of the mean squared difference: the largest of a dozen logits is by chance three times PyTorch's."""
    return (got.double() - truth).square().mean().sqrt().item()


def check_parity(model: nn.Module, arch: dict, images: Tensor) -> None:
    """float32 within its roundings of the reference in float64, bfloat16 within twice PyTorch's error in bfloat16."""
    double = vit.create(model.name, **(arch | {"dtype": "float64"}))
    double.load_state_dict(model.state_dict())
    low = vit.create(model.name, **(arch | {"dtype": "bfloat16"}))
    low.load_state_dict(model.state_dict())
    with torch.no_grad():
        truth = double(images.double())
        torch_error = mean_error(low(images.bfloat16()), truth)
    close(vit.Engine(model)(images), truth, WIDE)
    assert mean_error(vit.Engine(model, "bfloat16")(images), truth) < 2 * torch_error


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_gives_the_models_logits(option):
    arch = SMALL | OPTIONS[option]
    model = make(**arch)
    check_parity(model, arch, images_for(model))


@pytest.mark.parametrize("name", ["vit_digits", "vit_mnist_demo", *named.PLAIN])
def test_every_name_gives_the_models_logits(name):
    """Large models at depth 1: their layers differ in nothing but weights."""
    arch = {"backend": "reference", "training": False, "depth": 1}
    model = vit.create(name, **arch)
    model.load_state_dict(seeded_state(model.state_dict()))
    check_parity(model, arch, images_for(model, 1))


def test_norm_before_the_average():
    """reset_classifier changes the pooling and leaves the norm where it was."""
    model = make()
    model.reset_classifier(10, "avg")
    model.eval()
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)
    close(vit.Engine(model)(images), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_results_depend_neither_on_threads_nor_on_the_batch(dtype):
    """Bits, not tolerances. 8 threads on fewer cores also share columns, and 5 images leave some for all threads."""
    model = make(img_size=112)  # 197 tokens
    images = images_for(model, 5)
    alone = torch.cat([vit.Engine(model, dtype, num_threads=1)(image[None]) for image in images])
    for threads in (1, 2, 3, 8, 16):
        engine = vit.Engine(model, dtype, num_threads=threads)
        assert torch.equal(engine(images), alone), threads
        assert torch.equal(engine(images[:1]), alone[:1]), threads
        assert torch.equal(engine(images[[3, 3, 0]]), alone[[3, 3, 0]]), threads
    many = images.repeat(9, 1, 1, 1)  # more than a thread takes at a time
    assert torch.equal(vit.Engine(model, dtype)(many), alone.repeat(9, 1))


def smooth_images(batch: int, size: int = 224, seed: int = 1) -> Tensor:
    """Images with structure at several scales: noise alone hardly reaches the class token."""
    total = torch.zeros(batch, 3, size, size)
    for side, strength in ((4, 1.0), (16, 0.7), (64, 0.4), (size, 0.2)):
        noise = normal((batch, 3, side, side), "smooth images", seed, side)
        total += strength * torch.nn.functional.interpolate(noise, (size, size), mode="bilinear")
    return total


def cosine(got: Tensor, truth: Tensor) -> float:
    """The smallest cosine of a row."""
    return torch.nn.functional.cosine_similarity(got, truth).min().item()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_224"])
def test_int8_keeps_the_direction_of_the_logits(name):
    """Heavy-tailed weights and norms with outliers at full depth, with and without calibration."""
    model = vit.create(name, backend="reference", training=False)
    model.load_state_dict(seeded_state(model.state_dict()))
    images = smooth_images(2)
    with torch.no_grad():
        truth = model(images)
    engine = vit.Engine(model, "int8")
    got = engine(images)
    assert cosine(got, truth) > 0.998
    assert torch.equal(engine(images[1:]), got[1:])
    assert engine.memory["weights"] < 0.35 * vit.Engine(model).memory["weights"]
    assert cosine(vit.Engine(model, "int8", calibrate=smooth_images(2, seed=2))(images), truth) > 0.998


@pytest.mark.parametrize("option", OPTIONS)
def test_int8_runs_every_option(option):
    arch = SMALL | OPTIONS[option]
    model = make(**arch)
    images = images_for(model)
    with torch.no_grad():
        truth = model(images)
    assert cosine(vit.Engine(model, "int8")(images).flatten(1), truth.flatten(1)) > 0.99


def test_excluded_layers_stay_bfloat16(tmp_path):
    model = make(depth=4)
    images = images_for(model, 8)
    expected = vit.Engine(model, "bfloat16")(images)
    rounding = error(expected, vit.Engine(model)(images).double())
    layers = [f"blocks.{i}.{layer}" for i in range(4) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    errors = []
    for count in (0, 8, 16):
        engine = vit.Engine(model, "int8", exclude=layers[:count])
        errors.append(error(engine(images), expected.double()))
        engine.save(tmp_path / "model.vit")
        assert torch.equal(vit.Engine.load(tmp_path / "model.vit")(images), engine(images))
    # Smoothing rounds differently: the last two engines are both bfloat16's own error away from float32.
    assert errors[0] > errors[1] > errors[2] <= 2 * rounding
    with pytest.raises(ValueError, match=r"blocks\.9\.mlp\.fc1 cannot be excluded"):
        vit.Engine(model, "int8", exclude=["blocks.9.mlp.fc1"])
    with pytest.raises(ValueError, match="belong to dtype='int8'"):
        vit.Engine(model, "bfloat16", exclude=["blocks.0.mlp.fc1"])


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8.5), ("int4", 4.5)])
def test_weights_in_fewer_bits(tmp_path, weights, bits):
    """Close to the logits of the rounded weights, as small as promised in the file and in memory, and bits as for every
    dtype."""
    model = vit.create("vit_tiny_patch16_224", backend="reference", training=False)
    model.load_state_dict(seeded_state(model.state_dict()))
    images = smooth_images(5)
    with torch.no_grad():
        truth, rounded = model(images), rounded_to_codes(model, weights)(images)
    engine = vit.Engine(model, "bfloat16", weights=weights, num_threads=1)
    got = engine(images)
    assert cosine(got, rounded) > 0.999
    assert weights != "int8" or cosine(got, truth) > 0.999
    in_blocks = 12 * 12 * 192**2
    plain = vit.Engine(model, "bfloat16").memory["weights"]
    saved = plain - engine.memory["weights"]
    assert saved == pytest.approx(in_blocks * (16 - bits) / 8, rel=1e-3)
    engine.save(tmp_path / "model.vit")
    assert (tmp_path / "model.vit").stat().st_size == engine.memory["weights"]
    loaded = vit.Engine.load(tmp_path / "model.vit", num_threads=2)
    assert (loaded.dtype, loaded.weights, engine.weights) == ("bfloat16", weights, weights)
    assert torch.equal(loaded(images), got)
    assert torch.equal(loaded(images[3:4]), got[3:4])
    loaded.num_threads = 5
    assert torch.equal(loaded(images), got)
    kept = [f"blocks.{i}.mlp.fc2" for i in range(12)]
    partly = vit.Engine(model, "bfloat16", weights=weights, exclude=kept)
    assert engine.memory["weights"] < partly.memory["weights"] < plain


def rounded_to_codes(model: nn.Module, weights: str) -> nn.Module:
    """The model with block weights as `weights` stores them: groups of 32 along a row with a bfloat16 scale."""
    model, most = copy.deepcopy(model), {"int8": 128, "int4": 8}[weights]
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and name.endswith((*("qkv.weight", "proj.weight"), "fc1.weight", "fc2.weight")):
            for group in parameter.data.split(32, dim=1):
                extreme = group.gather(1, group.abs().argmax(1, keepdim=True))
                scale = (extreme / -most).bfloat16().float()
                codes = (group * (1 / scale)).round().clamp(-most, most - 1)
                group.copy_((codes * scale).bfloat16())
    return model


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("option", OPTIONS)
def test_weights_in_fewer_bits_are_the_rounded_ones(option, weights):
    """The same bits as an engine of the rounded weights."""
    model = make(**(SMALL | OPTIONS[option]))
    images = images_for(model)
    expected = vit.Engine(rounded_to_codes(model, weights), "bfloat16")(images)
    assert torch.equal(vit.Engine(model, "bfloat16", weights=weights)(images), expected)


def test_weights_in_fewer_bits_are_for_bfloat16():
    with pytest.raises(ValueError, match="weights='int4' belongs to dtype='bfloat16', not 'float32'"):
        vit.Engine(make(), weights="int4")
    with pytest.raises(ValueError, match="weights 'int2' is not one of int8, int4"):
        vit.Engine(make(), "bfloat16", weights="int2")


def test_threads_follow_torch():
    engine = vit.Engine(make())
    images = images_for(make(), 1)
    torch.set_num_threads(1)
    one = engine(images)
    torch.set_num_threads(2)
    assert torch.equal(engine(images), one)


def test_images_of_bytes_are_normalised_and_layouts_agree():
    model = make(img_size=(24, 40), patch_size=(8, 4))
    model.preprocess = Preprocess((24, 40), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    engine = vit.Engine(model)
    pixels = draw.randint(0, 256, (3, 24, 40, 3), dtype=torch.uint8)
    mean, std = torch.tensor(model.preprocess.mean), torch.tensor(model.preprocess.std)
    floats = (pixels / 255 - mean) / std
    expected = engine(floats.permute(0, 3, 1, 2).contiguous())
    assert torch.equal(engine(floats, layout="NHWC"), expected)
    assert torch.equal(engine(floats.permute(0, 3, 1, 2)), expected)  # channels_last
    assert torch.equal(engine(floats.permute(0, 3, 1, 2).numpy()), expected)
    for got in (engine(pixels, layout="NHWC"), engine(pixels.permute(0, 3, 1, 2).contiguous())):
        close(got, expected)
    assert torch.equal(engine(pixels.numpy(), layout="NHWC"), engine(pixels, layout="NHWC"))


def test_smaller_images_are_padded():
    arch = {"img_size": (30, 29), "dynamic_pad": True}
    model = make(**arch)
    images = draw.randn(2, 3, 27, 26)
    with torch.no_grad():
        expected = model(images)
    engine = vit.Engine(model)
    close(engine(images), expected)
    assert torch.equal(engine(images.permute(0, 2, 3, 1).contiguous(), layout="NHWC"), engine(images))
    with pytest.raises(ValueError, match="24 x 26, the engine takes 30 x 29"):
        engine(draw.randn(2, 3, 24, 26))


@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_other_outputs(pool):
    model = make(global_pool=pool)
    images = images_for(model, 2)
    engine = vit.Engine(model)
    got = engine(images, outputs=("tokens.0", "tokens.1", "features", "attention.1", "logits"))
    with torch.no_grad():
        first = model.blocks[0](model.embed(images))
        second = model.blocks[1](first)
        features = model.forward_head(model.norm(second), pre_logits=True)
        attn = model.blocks[1].attn
        q, k, _ = attn.qkv(model.blocks[1].norm1(first)).reshape(2, 17, 3, 2, 32).unbind(2)
        rows = (torch.einsum("bhd,bjhd->bhj", q[:, 0], k) * 32**-0.5).softmax(-1)
        expected = {"tokens.0": first, "tokens.1": second, "features": features, "attention.1": rows}
        expected["logits"] = model(images)
    assert got.keys() == expected.keys()
    for name in expected:
        close(got[name], expected[name], what=name)
        assert torch.equal(engine(images, outputs=name), got[name])
        assert got[name].shape == engine.shape(name, 2)
    close(got["attention.1"].sum(-1), torch.ones(2, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("arch", [{}, {"img_size": 128}, {"embed_dim": 192, "num_heads": 3}], ids=str)
def test_the_class_token_alone_has_the_bits_it_has_among_all(dtype, batch, arch):
    """Nobody sees the other tokens of the last block unless they are asked for: without, they are not computed."""
    model = make(**arch)
    images = images_for(model, batch)
    engine = vit.Engine(model, dtype)
    everything = engine(images, outputs=("tokens.1", "features", "attention.1", "logits"))
    for threads in (1, 2, 3, 5):
        engine.num_threads = threads
        alone = engine(images, outputs=("features", "attention.1", "logits"))
        for name in alone:
            assert torch.equal(alone[name], everything[name]), (name, threads)


def test_out_is_written_in_place():
    model = make()
    engine, images = vit.Engine(model), images_for(model)
    guarded = torch.full((5, 10), 7.0)
    assert engine(images, out=guarded[1:4]).data_ptr() == guarded[1].data_ptr()
    assert torch.equal(guarded[1:4], engine(images))
    assert bool((guarded[[0, 4]] == 7).all())
    out = {"logits": torch.empty(3, 10), "features": torch.empty(3, 64)}
    assert engine(images, out=out, outputs=("features", "logits"))["logits"] is out["logits"]
    for bad in (torch.empty(2, 10), torch.empty(3, 10, dtype=torch.float64), torch.empty(10, 3).t()):
        with pytest.raises(ValueError, match=r"contiguous float32 \[3, 10\]"):
            engine(images, out=bad)


def test_submit_and_many_threads():
    model = make()
    engines = [vit.Engine(model), vit.Engine(model, "bfloat16")]
    images = images_for(model, 4)
    expected = [engine(images) for engine in engines]
    futures = [engine.submit(images[i : i + 1]) for i in range(4) for engine in engines]
    assert all(torch.equal(f.result(60), expected[i % 2][i // 2][None]) for i, f in enumerate(futures))
    wrong = []

    def work(seed: int) -> None:
        for i in range(20):
            engine = (seed + i) % 2
            if not torch.equal(engines[engine](images), expected[engine]):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_max_batch_is_a_limit_and_none_is_not():
    model = make()
    limited, free = vit.Engine(model, max_batch=2), vit.Engine(model)
    reserved = limited.memory["intermediate"]
    assert torch.equal(limited(images := images_for(model, 2)), free(images))
    assert limited.memory["intermediate"] == reserved > 0
    with pytest.raises(ValueError, match="the batch is 3, the engine was made for at most 2"):
        limited(images_for(model, 3))
    assert free(images_for(model, 40)).shape == (40, 10)
    assert free(images_for(model, 0)).shape == (0, 10)


BAD_IMAGES = {
    "size": (draw.randn(1, 3, 32, 40), "32 x 40, the engine takes 32 x 32"),
    "channels": (draw.randn(1, 4, 32, 32), "4 channels, the engine takes 3"),
    "layout": (draw.randn(1, 32, 32, 3), 'pass layout="NHWC"'),
    "double": (draw.randn(1, 3, 32, 32).double(), "float64; allowed are float32"),
    "half": (draw.randn(1, 3, 32, 32).half(), "float16; allowed are float32"),
    "int64": (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "int64; allowed are float32"),
    "single": (draw.randn(3, 32, 32), r"add the batch dimension: images\[None\]"),
    "meta": (draw.randn(1, 3, 32, 32, device="meta"), "use images.cpu"),
    "nan": (torch.full((2, 3, 32, 32), torch.nan), "image 0 of 2 holds NaN or infinity"),
    "infinity": (torch.cat([torch.zeros(4, 3, 32, 32), torch.full((1, 3, 32, 32), torch.inf)]), "image 4 of 5"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_bad_images_are_errors_and_the_engine_stays_usable(dtype):
    model = make()
    engine = vit.Engine(model, dtype)
    images = images_for(model)
    expected = engine(images)
    for bad, message in BAD_IMAGES.values():
        with pytest.raises(ValueError, match=message):
            engine(bad)
        assert torch.equal(engine(images), expected)
    one_bad = torch.zeros(1, 3, 32, 32)
    one_bad[0, 2, 31, 31] = torch.nan  # the last pixel of the last patch
    with pytest.raises(ValueError, match="NaN"):
        engine(one_bad)
    with pytest.raises(TypeError, match="NumPy array"):
        engine([1.0])


def arrays(images: np.ndarray) -> dict[str, np.ndarray]:
    """The same values in every kind of memory that NumPy has for them."""
    spaced = np.zeros((*images.shape[:3], 2 * images.shape[3]), images.dtype)
    spaced[..., ::2] = images
    fields = np.zeros(images.shape, [("other", "u1"), ("pixel", images.dtype)])
    fields["pixel"] = images
    return {
        "contiguous": images.copy(),
        "reversed channels": images[:, ::-1].copy()[:, ::-1],
        "reversed rows": images[:, :, ::-1].copy()[:, :, ::-1],
        "reversed everything": images[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1],
        "F order": np.asfortranarray(images),
        "transposed": np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        "every second": spaced[..., ::2],
        "other byte order": images.astype(images.dtype.newbyteorder()),
        "between fields": fields["pixel"],
        "subclass": images[...].view(type("Mine", (np.ndarray,), {})),
    }


@pytest.mark.parametrize("kind", [np.float32, np.uint8])
def test_arrays_of_every_memory_layout(kind):
    """Taken alike, writeable or not, and left as they were."""
    engine = vit.Engine(make())
    rng = np.random.default_rng(0)
    images = (rng.random((2, 3, 32, 32)) * 255).astype(kind)
    expected = engine(torch.from_numpy(images.copy()))
    for name, array in arrays(images).items():
        for writeable in (True, False):
            array.flags.writeable = writeable
            assert torch.equal(engine(array), expected), (name, writeable)
            assert np.array_equal(array, images), name
            last = array.transpose(0, 2, 3, 1)
            assert torch.equal(engine(last, layout="NHWC"), expected), (name, writeable)
    bgr = np.ascontiguousarray(images.transpose(0, 2, 3, 1)[..., ::-1])
    assert torch.equal(engine(bgr[..., ::-1], layout="NHWC"), expected)
    assert torch.equal(engine(np.broadcast_to(images[:1], images.shape)), expected[:1].expand(2, -1))
    assert torch.equal(engine(torch.from_numpy(images.copy())[:1].expand(2, -1, -1, -1)), expected[:1].expand(2, -1))


def test_arrays_that_are_no_images_are_named():
    engine = vit.Engine(make())
    good = np.zeros((1, 3, 32, 32), np.float32)
    for kind in ("bool", "int8", "int64", "float64", "float16", "complex64", "object", "U1", "datetime64[s]", ">f8"):
        for writeable in (True, False):
            array = np.zeros(good.shape, kind)
            array.flags.writeable = writeable
            with pytest.raises(ValueError, match=r"images are .*; allowed are float32"):
                engine(array)
    for shape in ((), (3,), (3, 32, 32), (1, 1, 3, 32, 32), (0,)):
        with pytest.raises(ValueError, match="images must be"):
            engine(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="masked"):
        engine(np.ma.masked_array(good, good == 0))
    assert engine(np.zeros((0, 3, 32, 32), np.float32)).shape == (0, 10)


def test_tensors_that_are_not_what_their_memory_holds():
    engine = vit.Engine(make())
    images = draw.randn(1, 3, 32, 32)
    expected = engine(images)
    negated = torch.complex(torch.zeros_like(images), -images).conj().imag  # the sign stands in a flag
    assert negated.is_neg()
    assert torch.equal(engine(negated), expected)
    assert torch.equal(engine(images.clone().requires_grad_()), expected)
    for bad in (images.to_sparse(), images.to_mkldnn(), torch.nested.nested_tensor([images[0]], layout=torch.jagged)):
        with pytest.raises(ValueError, match=r"use images\.to_dense"):
            engine(bad)
    out = torch.complex(torch.zeros(1, 10), torch.zeros(1, 10)).conj().imag
    for wrong in (out, torch.zeros(1, 10).to_sparse(), torch.zeros(1, 1).expand(1, 10)):
        with pytest.raises(ValueError, match="must be contiguous float32"):
            engine(images, out=wrong)
    with pytest.raises(TypeError, match="must be a tensor, got ndarray"):
        engine(images, out={"logits": np.zeros((1, 10), np.float32)})


def test_bad_arguments():
    model = make()
    engine = vit.Engine(model)
    images = images_for(model)
    for outputs in ("logit", "tokens.2", "attention", ("logits", "logits"), ()):
        with pytest.raises(ValueError, match=r"vit\.Engine"):
            engine(images, outputs=outputs)
    with pytest.raises(ValueError, match="NCHW, NHWC"):
        engine(images, layout="CHWN")
    with pytest.raises(ValueError, match="out has logits"):
        engine(images, outputs=("features",), out={"logits": torch.empty(3, 10)})
    with pytest.raises(ValueError, match="must be a dict"):
        engine(images, outputs=("features", "logits"), out=torch.empty(3, 10))
    with pytest.raises(ValueError, match="dtype 'float16'"):
        vit.Engine(model, torch.float16)
    for name in ("max_batch", "num_threads"):
        for value in (0, -1, 2**63, 2**64 + 5, 10**30):  # one that ctypes would cut to its bits
            with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
                vit.Engine(model, **{name: value})
        for other in (1.5, "2", [1]):
            with pytest.raises(TypeError, match=rf"{name} must be a whole number or None, got "):
                vit.Engine(model, **{name: other})
    with pytest.raises(ValueError, match="num_threads must be below"):
        vit.Engine(model, num_threads=2**32 + 1)


def test_what_the_engine_cannot_run_is_a_reason():
    model = make()
    model.blocks[1].mlp = nn.Identity()
    with pytest.raises(vit.BackendError, match=r"blocks\.1\.mlp is a Identity; the engine knows Mlp"):
        vit.Engine(model)
    model = make()
    model.blocks[1].norm1.eps = 1e-3
    with pytest.raises(vit.BackendError, match="norm eps differs"):
        vit.Engine(model)
    with pytest.raises(vit.BackendError, match="got Linear"):
        vit.Engine(nn.Linear(2, 2))
    model = make()
    model.head.weight.data[3, 2] = torch.nan
    with pytest.raises(vit.BackendError, match=r"head\.weight holds NaN"):
        vit.Engine(model)
    with pytest.raises(vit.BackendError, match=r"mlp_width is 27; .*multiple of 2"):
        vit.Engine(make(embed_dim=18, num_heads=2, mlp_ratio=1.5), "bfloat16")
    with pytest.raises(vit.BackendError, match="has no values"):
        vit.Engine(make().to("meta"))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_engine_is_not_copied(duplicate):
    """Two objects with one native memory: the first to go would leave the other without it."""
    engine = vit.Engine(make())
    with pytest.raises(TypeError, match=r"cannot be copied or pickled; engine.save\(path\)"):
        duplicate(engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_save_and_load(tmp_path, dtype):
    model = make()
    model.class_names = tuple(f'class "{i}" é' for i in range(10))
    images = images_for(model)
    engine = vit.Engine(model, dtype)
    expected = engine(images)
    engine.save(tmp_path / "model.vit")
    loaded = vit.Engine.load(tmp_path / "model.vit", max_batch=3)
    assert torch.equal(loaded(images), expected)
    assert (loaded.dtype, loaded.name, loaded.class_names) == (dtype, model.name, model.class_names)
    assert loaded.preprocess == model.preprocess
    assert loaded.config == engine.config
    loaded.save(tmp_path / "again.vit")
    assert (tmp_path / "again.vit").read_bytes() == (tmp_path / "model.vit").read_bytes()


def test_the_file_is_safetensors(tmp_path):
    from safetensors import safe_open

    vit.Engine(make()).save(tmp_path / "model.vit")
    with safe_open(tmp_path / "model.vit", "pt") as file:
        assert file.metadata()["format"] == "vit-engine"
        assert file.get_tensor("norm.weight").shape == (64,)


def crc32c(data: bytes) -> int:
    """CRC-32C bit by bit, as its definition says."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


def signed(text: bytes) -> bytes:
    """An engine file's header of this JSON, with its checksum made anew: what somebody writes who means it."""
    text = text.rstrip()
    text += b" " * (-(8 + len(text)) % 64)
    header = len(text).to_bytes(8, "little") + re.sub(rb'("crc32c header":")[0-9a-f]{8}', rb"\g<1>00000000", text)
    return re.sub(rb'("crc32c header":")0{8}', rb"\g<1>%08x" % crc32c(header), header)


def test_damaged_and_foreign_files_are_errors(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.vit"
    vit.Engine(make()).save(path)
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little")

    def refused(content: bytes, message: str) -> None:
        (tmp_path / "bad.vit").write_bytes(content)
        with pytest.raises(OSError, match=message):
            vit.Engine.load(tmp_path / "bad.vit")

    refused(b"", "is empty")
    refused(b"GIF89a", "shorter than the length")
    refused(b"GIF89a and so on, a picture", "does not begin with a header")
    for size in (9, 100, 8 + header, len(good) // 2, len(good) - 1):
        refused(good[:size], "truncated|JSON|ends inside")
    for old, new, message in (
        (b'"version":"5"', b'"version":"3"', "format version 3"),
        (b'"isa":"', b'"isa":"x', "instruction-set level x"),
        (b'"embed_dim":"64"', b'"embed_dim":"65"', "not a multiple|damaged|embed_dim"),
        (b'"depth":"2"', b'"depth":"x"', 'depth is "x"'),
        (b'"depth":"2"', b'"depth":"3"', r"tensor blocks\.2.* is missing"),
        (b'"num_classes":"10"', b'"num_classes":"90"', r"tensor head\..* has"),
        (b'"F32"', b'"F64"', "damaged"),
        (b'"data_offsets":[0,', b'"data_offsets":[7,', "offsets"),
    ):
        text = good[8 : 8 + header].replace(old, new, 1)
        assert text != good[8 : 8 + header]
        refused(signed(text) + good[8 + header :], message)
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(OSError, match="other safetensors"):
        vit.Engine.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        vit.Engine.load(tmp_path / "absent.vit")
    with pytest.raises(OSError, match="not a file"):
        vit.Engine.load(tmp_path)
    with pytest.raises(OSError, match="cannot write"):
        vit.Engine(make()).save(tmp_path / "no" / "folder.vit")
    rng = np.random.default_rng(0)  # whatever bit is flipped, in the header or in the data, is noticed
    for end in (8 + header, len(good)):
        for place in rng.integers(0, end, 200):
            broken = bytearray(good)
            broken[place] ^= 1 << int(rng.integers(0, 8))
            refused(bytes(broken), "is not an engine file|is damaged|has format version|says nothing about")


IN_CHILD = """
import sys, json, torch, vit
engine = vit.Engine.load(sys.argv[1])
print(json.dumps(engine(torch.load(sys.argv[2])).tolist()))
"""


def test_a_file_of_another_level_is_refused(tmp_path):
    model = make()
    vit.Engine(model).save(tmp_path / "model.vit")
    torch.save(images_for(model), tmp_path / "images.pt")
    other = next(level for level in ("baseline", "v3") if level != vit.Engine(model).isa)
    if other not in vit.backends()["cpu"]["isa available"].split(", "):
        pytest.skip("this processor has one level")
    done = subprocess.run(
        [sys.executable, "-c", IN_CHILD, tmp_path / "model.vit", tmp_path / "images.pt"],
        env=ENVIRONMENT | {"VIT_CPU_ISA": other}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"was made for the instruction-set level {vit.Engine(model).isa}, this process uses {other}" in done.stderr


EVERY_LEVEL = """
import sys, json, torch, vit
from vit.preprocess import Preprocess
from vit.bench.cost import measure
from vit.bench.weights import seeded_state
from vit.support.random import normal
arch = json.loads(sys.argv[1])
model = vit.create("vit_tiny_patch16_224", **arch)
model.load_state_dict(seeded_state(model.state_dict()))
images = normal((3, 3, *model.patch_embed.img_size), "images")
with torch.no_grad():
    truth = model(images)
for dtype, bound in (("float32", 1e-5), ("bfloat16", 3e-2), ("int8", 1e-1)):
    engine = vit.Engine(model, dtype)
    got = engine(images)
    error = ((got - truth).abs().max() / truth.abs().max()).item()
    assert error < bound, (dtype, error)
    assert torch.equal(got[1:2], engine(images[1:2]))
from test_engine import rounded_to_codes
for weights in ("int8", "int4"):
    expected = vit.Engine(rounded_to_codes(model, weights), "bfloat16")(images)
    assert torch.equal(vit.Engine(model, "bfloat16", weights=weights)(images), expected), weights
print(engine.isa)
"""


@pytest.mark.parametrize("level", vit.backends()["cpu"].get("isa available", "").split(", "))
def test_every_level(level):
    for arch in (SMALL, SMALL | {"embed_dim": 24, "num_heads": 3, "img_size": (24, 40), "patch_size": (8, 4)}):
        done = subprocess.run(
            [sys.executable, "-c", EVERY_LEVEL, json.dumps(arch)],
            env=ENVIRONMENT | {"VIT_CPU_ISA": level}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == level


def test_profile_names_where_the_time_goes():
    model = make(img_size=112, global_pool="avg")
    phases = vit.Engine(model).profile(images_for(model, 2), calls=2)
    assert [phase.name for phase in phases][:4] == ["embed", "norm", "quantize", "qkv"]
    assert sum(phase.share for phase in phases) == pytest.approx(1)
    every = sum(phase.flops for phase in phases)
    assert every == 2 * measure(model.name, **_small(112)).macs * 2
    # Where the class token is taken, the last block makes only keys and values of 196 others.
    phases = vit.Engine(make(img_size=112)).profile(images_for(model, 2), calls=2)
    left_out = 196 * (64 * 64 + 2 * 197 * 64 + 64 * 64 + 2 * 64 * 256)
    assert every - sum(phase.flops for phase in phases) == 2 * 2 * left_out


def _small(img_size: int) -> dict:
    return {k: v for k, v in (SMALL | {"img_size": img_size}).items() if k not in ("backend", "training")}


OUT_OF_MEMORY = """
import re, resource, sys, torch, vit
from vit.engine import native
from vit.support.random import normal
model = vit.create("vit_base_patch16_224", backend="reference", depth=2, training=False)
images = normal((1, 3, 224, 224), "images")
engine = vit.Engine(model, num_threads=1)
expected = engine(images)

def refused(what, least, make):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 24 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        make()
    except MemoryError as error:
        assert native.library().last_status() == 4  # VIT_MEMORY
        assert native.library().last_error().decode() == str(error)
        asked = re.search(f"out of memory: {what} take ([0-9]+) bytes", str(error))
        assert asked and int(asked[1]) > least, error
    else:
        raise AssertionError(f"{what} fitted")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def with_many_threads():
    engine.num_threads = 1000
    engine(images)

refused("packed weights", 4 * 2 * 12 * 768**2, lambda: vit.Engine(model))
refused("intermediate results", 1000 * 104 * 3072 * 4, with_many_threads)
engine.num_threads = 1
assert torch.equal(engine(images), expected)
assert torch.equal(vit.Engine(model, num_threads=1)(images), expected)
"""


def test_out_of_memory_is_an_error_and_the_engine_stays_usable():
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_model_may_change_afterwards():
    model = make()
    images = images_for(model)
    engine = vit.Engine(model)
    expected = engine(images)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(engine(images), expected)
