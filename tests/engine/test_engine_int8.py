"""int8: a margin over weights and images on every instruction-set level, smoothing that changes no logits, products
that do not saturate."""

from __future__ import annotations

import copy
import json
import platform
import subprocess
import sys

import draw
import numpy as np
import pytest
import torch
import vit
from conftest import USABLE
from rounding import close
from safetensors.torch import load_file
from test_engine import ENVIRONMENT, OPTIONS, SMALL, error, images_for, make
from vit.engine.rounding import PAIRS_SATURATE, round_layers
from vit.engine.smooth import LAYERS, Inputs, natural_image, observe, smooth

pytestmark = pytest.mark.skipif("cpu" not in USABLE, reason="the cpu backend is not usable here")

LEVELS = vit.backends()["cpu"].get("isa available", "").split(", ")

SPREAD = """
import json, sys, torch, vit
from test_engine import cosine, smooth_images
from vit.bench.weights import seeded_state
found = []
for name, seeds in json.loads(sys.argv[1]).items():
    model = vit.create(name, backend="reference", training=False)
    for seed in seeds:
        model.load_state_dict(seeded_state(model.state_dict(), seed))
        images = smooth_images(2, seed=seed + 1)
        with torch.no_grad():
            truth = model(images)
        calibrated = vit.Engine(model, "int8", calibrate=smooth_images(2, seed=seed + 100))
        plain = vit.Engine(model, "int8")
        found.append((name, seed, cosine(plain(images), truth), cosine(calibrated(images), truth)))
print(json.dumps([plain.isa, found]))
"""


@pytest.mark.parametrize("level", LEVELS)
def test_a_margin_over_weights_and_images(level):
    """benchmarks/int8_spread.py is the same over many more; docs/engine.md has its table and limits.

    With weights rounded to the nearest the smallest calibrated cosine is 0.9988 or 0.9989, at every level."""
    seeds = {"vit_tiny_patch16_224": [0, 19], "vit_small_patch16_224": [4]}
    done = subprocess.run(
        [sys.executable, "-c", SPREAD, json.dumps(seeds)],
        env=ENVIRONMENT | {"VIT_CPU_ISA": level}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    isa, found = json.loads(done.stdout)
    assert isa == level
    for name, seed, plain, calibrated in found:
        assert plain > 0.998, (name, seed)
        assert calibrated > 0.9992, (name, seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    model = make()
    images = images_for(model)
    expected = vit.Engine(model, "int8", calibrate=images)(images)
    with torch.autocast("cpu", dtype):
        assert torch.equal(vit.Engine(model, "int8", calibrate=images)(images), expected)


@pytest.mark.parametrize("option", ["plain", "no-qkv-bias", "narrow", "average", "tanh"])
def test_smoothing_changes_no_logits(option):
    arch = SMALL | OPTIONS[option] | {"dtype": "float64"}
    model = vit.create("vit_tiny_patch16_224", **arch)
    model.load_state_dict(make(**(SMALL | OPTIONS[option])).state_dict())
    images = images_for(model).double()
    state = {name: t.detach() for name, t in model.state_dict().items()}
    smoothed, inputs = smooth(state, 2, observe(model, images))
    other = copy.deepcopy(model)
    other.load_state_dict(smoothed)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1"):
        name = f"blocks.1.{name}.weight"
        assert not torch.allclose(other.state_dict()[name], model.state_dict()[name], rtol=1e-3)
    with torch.no_grad():
        close(other(images), model(images))  # what is observed is float32
    seen = observe(other, images)
    assert set(seen) == {f"blocks.{i}.{name}" for i in range(2) for name in LAYERS}
    for name, found in seen.items():
        close(inputs[name].mean, found.mean)
        close(inputs[name].rows, found.rows)


def unpacked(weight: np.ndarray, N: int, K: int, vector: int, vectors: int) -> np.ndarray:
    """The signed bytes [N, K]: panels of so many vectors of columns, for each column four values of k at a time."""
    raw, rows = weight.reshape(-1).view(np.int8), []
    padded = -(-N // vector) * vector
    for first in range(0, padded, vector * vectors):
        width = min(vector * vectors, padded - first)
        panel = raw[first * K : (first + width) * K].reshape(K // 4, width, 4)
        rows.append(panel.transpose(1, 0, 2).reshape(width, K))
    return np.concatenate(rows)[:N].astype(np.int32)


def test_packed_weights_are_the_rounded_ones(tmp_path):
    """Bytes, scales, sums and biases, which take back what rounding took from the mean output, against NumPy; with
    saturating instructions no pair exceeds 128."""
    model = make(embed_dim=32, num_heads=2)
    engine = vit.Engine(model, "int8")
    engine.save(tmp_path / "model.vit")
    file = {n: t.numpy() for n, t in load_file(tmp_path / "model.vit").items() if n.startswith("blocks.")}
    state = {name: t.detach() for name, t in model.state_dict().items()}
    smoothed, inputs = smooth(state, 2, observe(model, natural_image(model)))
    pairs_saturate = engine.isa in PAIRS_SATURATE
    rounded = round_layers(smoothed, inputs, pairs_saturate)
    baseline = (4, 3) if platform.machine() == "aarch64" else (4, 2)
    shape = {"baseline": baseline, "v3": (8, 2), "amx": (16, 2)}.get(engine.isa, (16, 3))  # lanes, vectors of a tile
    exceeded = False
    for layer in (f"blocks.{i}.{name}" for i in range(2) for name in LAYERS):
        weight = smoothed[f"{layer}.weight"].numpy()
        pairs = np.abs(weight[:, ::2] + weight[:, 1::2]).max(1)
        exceeded |= bool((pairs > np.abs(weight).max(1)).any())
        largest = np.maximum(np.abs(weight).max(1), pairs if pairs_saturate else 0)
        scale = (largest / np.float32(127)).astype(np.float32)
        codes = np.rint(rounded[f"{layer}.weight"].numpy() / scale[:, None]).astype(np.int32)
        got = unpacked(file[f"{layer}.weight"], *weight.shape, *shape)
        np.testing.assert_array_max_ulp(file[f"{layer}.scale"][: len(scale)], scale, 1)
        assert np.array_equal(got, codes)
        lost = (weight - scale[:, None] * codes).astype(np.float64) @ inputs[layer].mean.numpy()
        close(file[f"{layer}.bias"][: len(scale)], smoothed[f"{layer}.bias"].numpy() + lost, what=layer)
        assert np.abs(lost).max() > 1e-4  # else nothing was corrected
        zero = 32 if layer.endswith("fc2") else 128
        assert np.array_equal(file[f"{layer}.sums"][: len(scale)], zero * codes.sum(1))
        if pairs_saturate:
            assert np.abs(got[:, ::2] + got[:, 1::2]).max() <= 127
    assert exceeded  # else the pairs were not tried


@pytest.mark.parametrize("pairs", [False, True])
def test_rounding_moves_the_outputs_less_than_rounding_to_nearest(pairs):
    """Inputs of few directions, as activations are: what one element loses others make up for, on other tokens too."""
    directions = draw.randn(12, 96) / 12**0.5
    x = draw.randn(500, 12) @ directions + 0.05 * draw.randn(500, 96) + 1
    seen, other = x[:250], x[250:]
    mean, even = seen.mean(0), torch.full((250,), 250**-0.5)
    inputs = {"layer": Inputs(seen.abs().amax(0), mean, seen * even[:, None], even)}
    weight, bias = draw.randn(40, 96), draw.randn(40)
    rounded = round_layers({"layer.weight": weight, "layer.bias": bias}, inputs, pairs)
    scale = rounded["layer.scale"]
    codes = rounded["layer.weight"] / scale[:, None]
    close(codes, codes.round())
    assert codes.abs().max() < 127.01
    assert not pairs or (codes[:, ::2] + codes[:, 1::2]).abs().max() < 127.01
    truth = other @ weight.T + bias
    moved = (other @ rounded["layer.weight"].T + rounded["layer.bias"] - truth).square().mean()
    nearest = (other @ (weight - (weight / scale[:, None]).round() * scale[:, None]).T).square().mean()
    assert moved < 0.1 * nearest


def test_products_of_the_largest_values_do_not_saturate():
    """Rows of equal weights meet inputs that all are the largest of their row: every product is at its limit."""
    model = make()
    with torch.no_grad():
        for block in model.blocks:
            for norm in (block.norm1, block.norm2):
                norm.weight.zero_()
                norm.bias.fill_(1.0)
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                layer.weight.copy_((torch.arange(len(layer.weight)) % 2 * 2.0 - 0.9)[:, None] / layer.in_features)
    images = images_for(model)
    assert (
        error(vit.Engine(model, "int8")(images), vit.Engine(model)(images).double()) < 1 / 127
    )  # one step of the largest
