"""vit.quantize: a margin on heavy-tailed weights, equal products on every backend, strict plans, saved and loaded."""

from __future__ import annotations

import copy
import pickle

import draw
import pytest
import quantized_helpers
import torch
import vit
from conftest import NATIVE
from quantized_helpers import FORMS
from torch import nn
from vit.backends import BackendError
from vit.bench.weights import seeded_state
from vit.model.quant_linear import QuantLinear
from vit.ops.quantized import FP8, INT8

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture(autouse=True)
def _built(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames:
        name = request.getfixturevalue("backend")
        routine = request.getfixturevalue("form").routine if "form" in request.fixturenames else INT8.routine
        if routine not in NATIVE[name].lib.fields:  # type: ignore[attr-defined]
            pytest.skip(f"{name} has no {routine}")


def make(backend: str = "reference", **options) -> vit.VisionTransformer:
    options = SMALL | {"training": False} | options
    model = vit.create("vit_tiny_patch16_224", backend=backend, **options)
    model.load_state_dict(seeded_state(model.state_dict()))
    return model


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return nn.functional.interpolate(draw.randn(count, 3, 8, 8), (size, size), mode="bicubic")


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.double(), b.double(), dim=-1).min().item()


#: What docs/quantization.md advises for fp8.
KEPT = ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", *(f"blocks.{i}.attn.{n}" for i in range(12) for n in ("qkv", "proj"))]


@pytest.mark.parametrize(
    ("dtype", "calibrated", "exclude", "least"),
    [
        ("int8", False, [], 0.998),
        ("int8", True, [], 0.998),
        ("fp8", False, [], 0.99),
        ("fp8", True, [], 0.996),
        ("fp8", True, KEPT, 0.999),
    ],
    ids=["int8", "int8-calibrated", "fp8", "fp8-calibrated", "fp8-mlps"],
)
def test_a_margin_over_seeded_weights(dtype, calibrated, exclude, least):
    """docs/quantization.md has the table, and why e4m3 of all layers cannot be where int8 is."""
    model = make(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3, num_classes=1000)
    given = images(2, 224)
    quantized = vit.quantize(model, dtype, exclude, images(2, 224) if calibrated else None)
    with torch.no_grad():
        assert cosine(quantized(given), model(given)) > least


@pytest.mark.parametrize("form", **FORMS)
def test_its_layers_are_the_rounded_ones(form):
    model = make()
    quantized = vit.quantize(model, form.name)
    for i, block in enumerate(quantized.blocks):
        for name in LAYERS:
            layer, linear = block.get_submodule(name), model.blocks[i].get_submodule(name)
            assert isinstance(layer, QuantLinear)
            assert isinstance(linear, nn.Linear)
            assert torch.equal(layer.weight.float(), form.quantize_rows(linear.weight)[0].float())
            scale, weight = layer.weight_scale[:, None], linear.weight
            # Half a step: 1, or of a float 2^-3 of its power of two, 2^-9 at least.
            step = scale if form is INT8 else scale * 2 ** ((weight / scale).abs().log2().floor() - 3).clamp(min=-9)
            assert ((layer.weight.float() * scale - weight).abs() <= 0.5001 * step).all()
            assert torch.equal(layer.bias, linear.bias)
    assert isinstance(quantized.head, nn.Linear)
    assert quantized.plan[form.routine] == "reference"
    assert set(quantized.plan) & {f.routine for f in (INT8, FP8)} == {form.routine}
    assert not quantized.training
    assert all(not p.requires_grad for p in quantized.parameters())
    assert next(model.parameters()).requires_grad  # the original is as it was


@pytest.mark.parametrize("form", **FORMS)
def test_equal_products_in_a_model(backend, device, form):
    """Every layer's product, on the input it met, is the reference's, of integers to the bit; the plan is strict."""
    model = vit.quantize(make(backend), form.name)
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
        weight, scale = layer.weight.cpu(), layer.weight_scale.cpu()
        quantized_helpers.check_sums(form, backend, device, x.flatten(0, -2), weight, scale)
    assert cosine(unfused.cpu(), vit.quantize(make(), form.name)(given)) > 0.9999


@pytest.mark.parametrize("form", **FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_and_unfused(backend, device, dtype, form):
    """A block computes its quantized layers inside; a hook on them changes nothing but the rounding of sums."""
    model = vit.quantize(make(backend), form.name).to(dtype)
    assert model.blocks[0].can_fuse()
    given = images().to(device, dtype)
    fused = model(given)
    model.blocks[0].mlp.fc2.register_forward_hook(lambda *_: None)
    assert not model.blocks[0].can_fuse()
    assert cosine(fused.float(), model(given).float()) > (0.9999 if dtype == torch.float32 else 0.999)


@pytest.mark.parametrize("form", **FORMS)
def test_dtype_and_copies(form):
    """Scales stay float32; copies, pickles and torch.compile compute the same."""
    model = vit.quantize(make(), form.name)
    given = images()
    expected = model(given)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(given), expected)
    half = model.to(torch.bfloat16)
    layer = half.blocks[0].attn.qkv
    assert (layer.weight.dtype, layer.weight_scale.dtype, layer.bias.dtype) == (form.dtype,) + (torch.float32,) * 2
    assert torch.equal(half.float().blocks[0].attn.qkv.weight_scale, layer.weight_scale)


@pytest.mark.parametrize("form", **FORMS)
def test_saved_and_loaded(tmp_path, form):
    kept = ["blocks.1.mlp.fc2"]
    model = vit.quantize(make(), form.name, calibrate=images(4), exclude=kept)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = vit.quantize(vit.create("vit_tiny_patch16_224", **SMALL, training=False), form.name, exclude=kept)
    weights = [m.blocks[0].attn.qkv.weight.view(torch.uint8) for m in (other, model)]
    assert not torch.equal(*weights)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert isinstance(other.blocks[1].mlp.fc2, nn.Linear)
    given = images()
    assert cosine(other(given), model(given)) > 0.9999
    assert torch.equal(*weights)


@pytest.mark.parametrize("form", **FORMS)
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
def test_weights_of_another_format_are_refused(form, options):
    """PyTorch would round the numbers of one to those of the other, under the scales of the other."""
    other = FP8 if form is INT8 else INT8
    model = vit.quantize(make(), form.name)
    states = {
        str(other.dtype): vit.quantize(make(), other.name).state_dict(),
        "torch.float32": make().state_dict(),
    }
    for given, state in states.items():
        before = model.blocks[0].attn.qkv.weight.view(torch.uint8).clone()
        with pytest.raises(RuntimeError, match=f"qkv.weight is {given}, this layer multiplies {form.dtype}: load"):
            model.load_state_dict(state, **options)
        assert torch.equal(model.blocks[0].attn.qkv.weight.view(torch.uint8), before)


@pytest.mark.parametrize("form", **FORMS)
def test_calibration_changes_only_what_is_rounded(form):
    """With all layers but one excluded, the smoothed network is the network: excluded biases are not moved. For floats
    nothing is smoothed, and all but that layer is as it was."""
    model, seen = make(), images(4)
    everything = [f"blocks.{i}.{name}" for i in range(2) for name in LAYERS]
    kept = vit.quantize(model, form.name, exclude=everything[:-1], calibrate=seen)
    plain = vit.quantize(model, form.name, exclude=everything[:-1])
    given = images()
    if form is INT8:
        assert cosine(kept(given), plain(given)) > 0.9999
        assert not torch.equal(kept.blocks[0].norm1.weight, model.blocks[0].norm1.weight)
    else:
        state = kept.state_dict()
        assert all(torch.equal(state[n], t) for n, t in model.state_dict().items() if not n.startswith(everything[-1]))
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


def test_a_backend_without_the_product_is_refused():
    """By name, when the model is quantized; "auto" takes the reference for it and says so in the plan."""
    for name, record in NATIVE.items():
        if record.unavailable() is None and FP8.routine not in record.lib.fields:
            model = make(name)
            with pytest.raises(BackendError, match=f"its compiled module has no {FP8.routine}"):
                vit.quantize(model, "fp8")
            assert model(images().to(model.device)).isfinite().all()  # the model is as it was
    assert vit.quantize(make("auto"), "fp8").plan[FP8.routine] in ("reference", "cuda")


def test_refusals():
    model = make()
    with pytest.raises(ValueError, match=r"dtype 'int4' is not one of int8, fp8"):
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
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv is quantized already"):
        vit.quantize(quantized, "fp8")
    hooked = make()
    hooked.norm.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="calibrate cannot follow this model: norm has a forward hook"):
        vit.quantize(hooked, calibrate=images())


def test_calibration_smooths_gated_mlps():
    model = make(mlp_layer="swiglu_packed")
    x = images()
    with torch.no_grad():
        assert cosine(vit.quantize(model, calibrate=x)(x), model(x)) > 0.99
