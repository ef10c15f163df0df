"""vit.quantize: a margin on heavy-tailed weights, equal products on every backend, strict plans, saved and loaded."""

from __future__ import annotations

import copy
import functools
import pickle

import draw
import pytest
import quantized_helpers
import torch
import vit
from conftest import NATIVE
from quantized_helpers import FORMS
from rounding import WIDE, close
from test_eva import arguments
from torch import nn
from vit.backends import BackendError
from vit.bench.weights import seeded_state
from vit.engine.accepts import refusals
from vit.engine.smooth import natural_image, observe, smooth
from vit.model.attention_rope import EvaAttention
from vit.model.mlp import Mlp
from vit.model.quant_linear import QuantLinear
from vit.ops.quantized import FP8, INT8

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
SPLIT = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj")
GATED = ("mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")
#: Models of other blocks, one of every form of attention and MLP, and the layers of each block.
OTHERS = {
    "eva02_tiny_patch14_224": LAYERS,  # biases of queries and values apart, packed gates
    "eva02_base_patch14_448": SPLIT + GATED,  # a norm behind the gates
    "eva02_large_patch14_clip_336": SPLIT + GATED,  # and one behind the attention
    "eva02_enormous_patch14_clip_224": LAYERS,  # norms behind the branches
    "vit_small_patch16_dinov3": LAYERS,  # no bias of queries, keys and values
    "vit_small_plus_patch16_dinov3_qkvb": LAYERS[:2] + GATED,
    "vit_pe_core_tiny_patch16_384": LAYERS,  # pooling by attention
}
POST_NORM = "eva02_enormous_patch14_clip_224"


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


def other(name: str, backend: str = "reference") -> vit.VisionTransformer:
    """A small model of another family, with such weights, layer scales near one."""
    model = vit.create(name, backend=backend, training=False, **arguments(name))
    model.load_state_dict(seeded_state(model.state_dict()))
    return model


def images_of(model: vit.VisionTransformer, count: int = 2) -> torch.Tensor:
    size = model.patch_embed.img_size
    return nn.functional.interpolate(draw.randn(count, 3, 8, 8), size, mode="bicubic")


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return nn.functional.interpolate(draw.randn(count, 3, 8, 8), (size, size), mode="bicubic")


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.double(), b.double(), dim=-1).min().item()


def error(a: torch.Tensor, truth: torch.Tensor) -> float:
    """1 - cosine, the mean over images."""
    return 1.0 - torch.cosine_similarity(a.double(), truth.double(), dim=-1).mean().item()


def check_layer(own, weight, bias, form, inputs):
    """Nearest numbers; the bias takes back what they take from the mean output, where the inputs are known."""
    q, scale = form.quantize_rows(weight)
    assert torch.equal(own.weight.float(), q.float())
    if bias is None or inputs is None:
        assert own.bias is None if bias is None else torch.equal(own.bias, bias)
        return
    taken = (weight - q.float() * scale) @ inputs.mean
    assert taken.abs().max() > 0
    close(own.bias, bias + taken)


def seen_without_images(model, names):
    """The inputs over the image that stands for others, of a model that vit.Engine can run."""
    return {} if list(refusals(model)) else observe(model, natural_image(model), names)


#: What docs/quantization.md advises for fp8: all but the MLPs of the second half.
KEPT = [f"blocks.{i}.{layer}" for i in range(12) for layer in LAYERS if i < 6 or "mlp" not in layer]


@pytest.mark.parametrize(
    ("dtype", "calibrated", "exclude", "least"),
    [
        ("int8", False, [], 0.998),
        ("int8", True, [], 0.999),
        ("fp8", False, [], 0.992),
        ("fp8", True, [], 0.992),
        ("fp8", True, KEPT, 0.999),
    ],
    ids=["int8", "int8-calibrated", "fp8", "fp8-calibrated", "fp8-mlps"],
)
def test_a_margin_over_seeded_weights(dtype, calibrated, exclude, least):
    """docs/quantization.md has the spread, and why e4m3 of all layers cannot be where int8 is. What a product rounds
    moves with PyTorch's instruction set and is carried through all blocks."""
    model = make(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3, num_classes=1000)
    given = images(2, 224)
    quantized = vit.quantize(model, dtype, exclude, images(2, 224) if calibrated else None)
    with torch.no_grad():
        assert cosine(quantized(given), model(given)) > least


@pytest.mark.parametrize(
    ("name", "dtype", "least"),
    [
        ("eva02_tiny_patch14_224", "int8", 0.999),
        ("eva02_tiny_patch14_224", "fp8", 0.996),
        ("vit_small_patch16_dinov3", "int8", 0.999),
    ],
)
def test_a_margin_of_other_families(name, dtype, least):
    """At their depth, on 49 or 64 patches."""
    model = vit.create(name, backend="reference", training=False, img_size=112, embed_dim=192, num_heads=3)
    model.load_state_dict(seeded_state(model.state_dict()))
    given = images_of(model)
    quantized = vit.quantize(model, dtype, calibrate=images_of(model))
    with torch.no_grad():
        assert cosine(quantized(given), model(given)) > least


@pytest.mark.parametrize("form", **FORMS)
def test_its_layers_are_the_rounded_ones(form):
    model = make()
    quantized = vit.quantize(model, form.name)
    seen = seen_without_images(model, [f"blocks.{i}.{name}" for i in range(2) for name in LAYERS])
    for i, block in enumerate(quantized.blocks):
        for name in LAYERS:
            layer, linear = block.get_submodule(name), model.blocks[i].get_submodule(name)
            assert isinstance(layer, QuantLinear)
            assert isinstance(linear, nn.Linear)
            check_layer(layer, linear.weight, linear.bias, form, seen[f"blocks.{i}.{name}"])
            scale, weight = layer.weight_scale[:, None], linear.weight
            # Half a step: 1, or of a float 2^-3 of its power of two, 2^-9 at least.
            step = scale if form is INT8 else scale * 2 ** ((weight / scale).abs().log2().floor() - 3).clamp(min=-9)
            assert ((layer.weight.float() * scale - weight).abs() <= 0.5001 * step).all()
    assert isinstance(quantized.head, nn.Linear)
    assert quantized.plan[form.routine] == "reference"
    assert set(quantized.plan) & {f.routine for f in (INT8, FP8)} == {form.routine}
    assert not quantized.training
    assert all(not p.requires_grad for p in quantized.parameters())
    assert next(model.parameters()).requires_grad  # the original is as it was


@pytest.mark.parametrize("form", **FORMS)
@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_families(name, form):
    """All linear layers of the blocks, and nothing else; a bias that stood apart is theirs. With the biases as they
    were the logits are those of the model with rounded weights whose layers are given rounded inputs."""
    model = other(name)
    quantized = vit.quantize(model, form.name)
    found = {n for n, layer in quantized.named_modules() if isinstance(layer, QuantLinear)}
    assert found == {f"blocks.{i}.{layer}" for i in range(2) for layer in OTHERS[name]}
    assert not any(type(m) is nn.Linear for m in quantized.blocks.modules())
    seen = seen_without_images(model, found)
    assert bool(seen) == (name != POST_NORM)
    for layer in found:
        own, linear = quantized.get_submodule(layer), model.get_submodule(layer)
        attn = model.get_submodule(layer.rpartition(".")[0])
        bias = linear.bias
        if layer.endswith("qkv") and getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        check_layer(own, linear.weight, bias, form, seen.get(layer))
        if bias is not None:
            own.bias.copy_(bias.detach())

    def rounded(x: torch.Tensor) -> torch.Tensor:
        q, scale = form.quantize_rows(x)
        return q.float() * scale

    with torch.no_grad():
        for layer in found:
            model.get_submodule(layer).weight.copy_(rounded(model.get_submodule(layer).weight))
        for block in model.blocks:
            for place in (block.attn, block.attn.proj, block.mlp, block.mlp.fc2):
                place.register_forward_pre_hook(lambda _, given: (rounded(given[0]), *given[1:]))
        given = images_of(model)
        assert cosine(quantized(given), model(given)) > 0.9999


@pytest.mark.parametrize("form", **FORMS)
@pytest.mark.parametrize("name", [None, *OTHERS])
def test_equal_products_in_a_model(backend, device, form, name):
    """Every layer's product, on the input it met, is the reference's, of integers to the bit; the plan is strict."""
    original = functools.partial(other, name) if name else make
    model = vit.quantize(original(backend), form.name)
    assert set(model.plan.values()) == {backend}
    met = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            layer.register_forward_pre_hook(lambda _, given, name=layer_name: met.update({name: given[0].cpu()}))
    given = images_of(model)
    unfused = model(given.to(device))
    assert len(met) == 2 * len(OTHERS.get(name, LAYERS))
    for layer_name, x in met.items():
        layer = model.get_submodule(layer_name)
        weight, scale = layer.weight.cpu(), layer.weight_scale.cpu()
        quantized_helpers.check_sums(form, backend, device, x.flatten(0, -2), weight, scale)
    assert cosine(unfused.cpu(), vit.quantize(original("reference"), form.name)(given)) > 0.9999


@pytest.mark.parametrize("form", **FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [None, *(name for name in OTHERS if name != POST_NORM)])
def test_fused_and_unfused(backend, device, dtype, form, name):
    """A block computes its quantized layers inside; a hook on them changes nothing but the rounding of sums."""
    model = vit.quantize(other(name, backend) if name else make(backend), form.name).to(device)
    given = images_of(model, 2 if dtype == torch.float32 else 16).to(device)
    truth = model(given)
    model.to(dtype)
    assert model.blocks[0].can_fuse()
    fused = model(given.to(dtype))
    model.blocks[0].mlp.fc2.register_forward_hook(lambda *_: None)
    assert not model.blocks[0].can_fuse()
    unfused = model(given.to(dtype))
    if dtype == torch.float32:
        assert cosine(fused, unfused) > 0.9999
        return
    # Of bfloat16 each rounds elsewhere, and single images differ by up to 0.003: mean errors are alike (0.7 to 1.2).
    assert error(fused, truth) < 1.5 * error(unfused, truth) + 1e-5


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
@pytest.mark.parametrize("name", OTHERS)
def test_other_families_saved_and_loaded(tmp_path, form, name):
    kept = ["blocks.1.attn.proj"]
    model = vit.quantize(other(name), form.name, exclude=kept)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = vit.create(name, backend="reference", training=False, **arguments(name))
    loaded = vit.quantize(fresh, form.name, exclude=kept)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert type(loaded.blocks[1].attn.proj) is nn.Linear
    given = images_of(model)
    expected = model(given)
    for same in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(given), expected)


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


@pytest.mark.parametrize("mlp_layer", ["swiglu_packed", "swiglu"])
def test_calibration_smooths_gated_mlps(mlp_layer):
    model = make(mlp_layer=mlp_layer)
    x = images()
    quantized = vit.quantize(model, calibrate=x)
    assert not any(type(m) is nn.Linear for m in quantized.blocks.modules())
    with torch.no_grad():
        assert cosine(quantized(x), model(x)) > 0.99


@pytest.mark.parametrize("name", [name for name in OTHERS if name != POST_NORM])
def test_calibration_of_other_families(name):
    """The smoothed network is the network."""
    model = other(name)
    seen, given = images_of(model, 4), images_of(model)
    smoothed = copy.deepcopy(model)
    for block in smoothed.blocks:
        if isinstance(block.attn, EvaAttention):
            block.attn.join_biases()
    layers = [f"blocks.{i}.{layer}" for i in range(2) for layer in OTHERS[name]]
    before = smoothed.state_dict()
    after, _ = smooth(dict(before), 2, observe(smoothed, seen, layers))
    moved = {n.split(".", 2)[2] for n, tensor in after.items() if tensor is not before[n]}
    first = ("attn.qkv",) if "attn.qkv" in OTHERS[name] else SPLIT[:3]
    assert moved >= {"norm1.weight", "norm2.weight", "attn.proj.weight", *(f"{layer}.weight" for layer in first)}
    assert ("mlp.fc2.weight" in moved) == (type(model.blocks[0].mlp) is not Mlp)
    smoothed.load_state_dict(after)
    with torch.no_grad():
        close(smoothed(given), model(given).double(), WIDE)


def test_calibration_of_norms_behind_the_branches_is_refused():
    model = other(POST_NORM)
    with pytest.raises(ValueError, match="calibrate cannot follow this model: use_post_norm=True: the engine computes"):
        vit.quantize(model, calibrate=images_of(model))
