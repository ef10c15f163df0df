"""vit.quantize: a margin on heavy-tailed weights, equal integers on every backend, strict plans, saved and loaded."""

from __future__ import annotations

import copy
import pickle

import draw
import pytest
import torch
import vit
from conftest import NATIVE
from torch import nn
from vit.backends import BackendError
from vit.bench.weights import seeded_state
from vit.model.quant_linear import QuantLinear
from vit.ops._linear_int8 import quantize_rows

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture(autouse=True)
def _built(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames:
        name = request.getfixturevalue("backend")
        if "linear_int8" not in NATIVE[name].lib.fields:  # type: ignore[attr-defined]
            pytest.skip(f"{name} has no linear_int8")


def make(backend: str = "reference", **options) -> vit.VisionTransformer:
    options = SMALL | {"training": False} | options
    model = vit.create("vit_tiny_patch16_224", backend=backend, **options)
    model.load_state_dict(seeded_state(model.state_dict()))
    return model


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return nn.functional.interpolate(draw.randn(count, 3, 8, 8), (size, size), mode="bicubic")


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.double(), b.double(), dim=-1).min().item()


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_margin_over_seeded_weights(calibrated):
    """docs/quantization.md has the table."""
    model = make(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3, num_classes=1000)
    given = images(2, 224)
    quantized = vit.quantize(model, "int8", calibrate=images(2, 224) if calibrated else None)
    with torch.no_grad():
        assert cosine(quantized(given), model(given)) > 0.998


def test_its_layers_are_the_rounded_ones():
    model = make()
    quantized = vit.quantize(model)
    for i, block in enumerate(quantized.blocks):
        for name in LAYERS:
            layer, linear = block.get_submodule(name), model.blocks[i].get_submodule(name)
            assert isinstance(layer, QuantLinear)
            assert isinstance(linear, nn.Linear)
            assert torch.equal(layer.weight, quantize_rows(linear.weight)[0])
            assert (
                (layer.weight * layer.weight_scale[:, None] - linear.weight)
                .abs()
                .amax(1)
                .le(0.5001 * layer.weight_scale)
                .all()
            )
            assert torch.equal(layer.bias, linear.bias)
    assert isinstance(quantized.head, nn.Linear)
    assert quantized.plan["linear_int8"] == "reference"
    assert not quantized.training
    assert all(not p.requires_grad for p in quantized.parameters())
    assert next(model.parameters()).requires_grad  # the original is as it was


def test_equal_integers_in_a_model(backend, device):
    """Every layer's product, on the input it met, is the reference's to the bit; the plan is strict."""
    model = vit.quantize(make(backend))
    assert set(model.plan.values()) == {backend}
    met = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            layer.register_forward_pre_hook(lambda _, given, name=name: met.update({name: given[0].cpu()}))
    given = images()
    unfused = model(given.to(device))
    assert len(met) == 8
    for name, x in met.items():
        layer = model.get_submodule(name)
        ours = vit.ops.linear_int8(x.to(device), layer.weight, layer.weight_scale, backend=backend)
        weight, scale = layer.weight.cpu(), layer.weight_scale.cpu()
        assert torch.equal(ours.cpu(), vit.ops.linear_int8(x, weight, scale, backend="reference"))
    assert cosine(unfused.cpu(), vit.quantize(make())(given)) > 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_and_unfused(backend, device, dtype):
    """A block computes its quantized layers inside; a hook on them changes nothing but the rounding of sums."""
    model = vit.quantize(make(backend)).to(dtype)
    assert model.blocks[0].can_fuse()
    given = images().to(device, dtype)
    fused = model(given)
    model.blocks[0].mlp.fc2.register_forward_hook(lambda *_: None)
    assert not model.blocks[0].can_fuse()
    assert cosine(fused.float(), model(given).float()) > (0.9999 if dtype == torch.float32 else 0.999)


def test_dtype_and_copies():
    """Scales stay float32; copies, pickles and torch.compile compute the same."""
    model = vit.quantize(make())
    given = images()
    expected = model(given)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(given), expected)
    half = model.to(torch.bfloat16)
    layer = half.blocks[0].attn.qkv
    assert (layer.weight.dtype, layer.weight_scale.dtype, layer.bias.dtype) == (torch.int8,) + (torch.float32,) * 2
    assert torch.equal(half.float().blocks[0].attn.qkv.weight_scale, layer.weight_scale)


def test_saved_and_loaded(tmp_path):
    model = vit.quantize(make(), calibrate=images(4), exclude=["blocks.1.mlp.fc2"])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = vit.quantize(vit.create("vit_tiny_patch16_224", **SMALL, training=False), exclude=["blocks.1.mlp.fc2"])
    assert not torch.equal(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert isinstance(other.blocks[1].mlp.fc2, nn.Linear)
    given = images()
    assert cosine(other(given), model(given)) > 0.9999
    assert torch.equal(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_calibration_changes_only_what_is_rounded():
    """With all layers but one excluded, the smoothed network is the network: excluded biases are not moved."""
    model, seen = make(), images(4)
    everything = [f"blocks.{i}.{name}" for i in range(2) for name in LAYERS]
    kept = vit.quantize(model, exclude=everything[:-1], calibrate=seen)
    plain = vit.quantize(model, exclude=everything[:-1])
    given = images()
    assert cosine(kept(given), plain(given)) > 0.9999
    assert not torch.equal(kept.blocks[0].norm1.weight, model.blocks[0].norm1.weight)
    for name in everything[:-1]:
        if name.endswith(("attn.proj", "mlp.fc1")):
            assert torch.equal(kept.get_submodule(name).bias, model.get_submodule(name).bias)
    last = everything[-1]
    assert not torch.equal(kept.get_submodule(last).bias, plain.get_submodule(last).bias)


def test_a_replaced_module_is_still_called():
    model = make()

    class Doubled(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    given, plain = images(), vit.quantize(model)
    model.blocks[0].norm1 = Doubled(64)
    quantized = vit.quantize(model)
    assert not quantized.blocks[0].can_fuse()
    assert quantized.blocks[1].can_fuse()
    assert cosine(quantized(given), plain(given)) < 0.9999


def test_refusals():
    model = make()
    with pytest.raises(ValueError, match=r"dtype 'int4' is not one of int8"):
        vit.quantize(model, "int4")
    with pytest.raises(TypeError, match=r"takes a vit.VisionTransformer, got Linear"):
        vit.quantize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"head cannot be excluded; layers that are quantized are blocks.0.attn.qkv"):
        vit.quantize(model, exclude=["head"])
    with pytest.raises(ValueError, match=r"got the text 'blocks.0.attn.qkv'"):
        vit.quantize(model, exclude="blocks.0.attn.qkv")
    everything = [f"blocks.{i}.{name}" for i in range(2) for name in LAYERS]
    with pytest.raises(ValueError, match="no layer is left"):
        vit.quantize(model, exclude=everything)
    with pytest.raises(ValueError, match="calibrate holds no images"):
        vit.quantize(model, calibrate=images()[:0])
    quantized = vit.quantize(model)
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv is quantized already"):
        vit.quantize(quantized)
    with pytest.raises(BackendError, match="a quantized model has no backward: train the model first"):
        quantized.train()
    with pytest.raises(BackendError, match="requires a gradient"):
        quantized(images().requires_grad_())
    hooked = make()
    hooked.norm.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="calibrate cannot smooth this model: norm has a forward hook"):
        vit.quantize(hooked, calibrate=images())


def test_calibration_smooths_gated_mlps():
    model = make(mlp_layer="swiglu_packed")
    x = images()
    with torch.no_grad():
        assert cosine(vit.quantize(model, calibrate=x)(x), model(x)) > 0.99
