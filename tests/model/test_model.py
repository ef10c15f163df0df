"""The model against timm and float64, its options, its errors, and what may happen to it in a program."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import pickle
from types import SimpleNamespace

import draw
import named
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import vit
from rounding import close
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vit.backends import BackendError, records
from vit.model import VisionTransformer, patchify, pos_embed, unpatchify
from vit.model.blocks import Block
from vit.model.configs import CONFIGS
from vit.model.layers import DropPath
from vit.model.planned import CallsOps
from vit.support.random import normal

TIMM_NAMES = named.PLAIN

#: 17 tokens of 64 channels, two blocks: every code path in milliseconds.
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 7}


def small(seed: int = 0, backend: str = "reference", **arch) -> VisionTransformer:
    torch.manual_seed(seed)
    return vit.create("vit_tiny_patch16_224", backend=backend, **(SMALL | arch))


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(shape or (3, 3, 32, 32), "images").to(dtype)


def assert_as_exact(got: Tensor, other: Tensor, truth: Tensor) -> None:
    """The project's rule: at most twice the error of the other implementation, plus rounding noise."""
    noise = 4 * torch.finfo(got.dtype).eps * truth.abs().max()
    error, bound = (got - truth).abs().max(), 2 * (other - truth).abs().max() + noise
    assert error <= bound, f"error {error:.3g}, allowed {bound:.3g}"


# ---- timm ----


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_parameters_are_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
        ours = vit.create(name, backend="reference", device="meta")
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert list(shapes) == list(theirs.state_dict())


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_logits_are_timms(name):
    """The named widths, patch and heads on six patches and one block; state dicts go strictly both ways."""
    patch = CONFIGS[name].arch["patch_size"]
    arch = {"depth": 1, "num_classes": 5, "img_size": (2 * patch, 3 * patch)}
    with torch.device("meta"):
        theirs = timm.create_model(name, **arch).eval()
    for parameter in theirs.to_empty(device="cpu").parameters():  # nothing at zero or one, where bugs hide
        draw.normal_(parameter, std=0.05)
    ours = vit.create(name, backend="reference", weight_init="skip", **arch).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 3, *arch["img_size"])
    with torch.inference_mode():
        got, other = ours(x), theirs(x)
        theirs.load_state_dict(ours.state_dict())
        truth = theirs.double()(x.double())
    assert_as_exact(got, other, truth)


def test_logits_of_a_whole_model_are_timms():
    theirs = draw.fill(timm.create_model("vit_tiny_patch16_224").eval(), 0.05)
    ours = vit.create("vit_tiny_patch16_224", backend="auto").eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(1, 3, 224, 224)
    with torch.inference_mode():
        assert_as_exact(ours(x), theirs(x), theirs.double()(x.double()))


@pytest.mark.parametrize(
    "arch",
    [
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "", "num_classes": 0},
        {"pos_embed": "none"},
        {"qkv_bias": False},
        {"img_size": (32, 48), "patch_size": (8, 16)},
        {"in_chans": 5},
        {"mlp_ratio": 2.5},
        {"act_layer": "gelu_tanh"},
    ],
    ids=str,
)
def test_options_are_timms(arch):
    translated = {"pos_embed": {"none": "none"}, "act_layer": {"gelu_tanh": "gelu_tanh"}}
    theirs_arch = {key: translated.get(key, {}).get(value, value) for key, value in (SMALL | arch).items()}
    theirs = draw.fill(timm.create_model("vit_tiny_patch16_224", **theirs_arch).eval(), 0.05)
    ours = small(**arch).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(2, ours.patch_embed.in_chans, *ours.patch_embed.img_size)
    got, other = ours(x), theirs(x)
    assert got.shape == other.shape
    assert_as_exact(got.detach(), other.detach(), theirs.double()(x.double()).detach())


def test_intermediates_are_timms():
    theirs = draw.fill(timm.create_model("vit_tiny_patch16_224", **SMALL).eval(), 0.05)
    ours = small().eval()
    ours.load_state_dict(theirs.state_dict())
    x = images()
    for arguments in (
        {},
        {"indices": 1, "norm": True},
        {"indices": [0, -1], "return_prefix_tokens": True, "output_fmt": "NLC"},
        {"indices": [0], "stop_early": True, "intermediates_only": True},
    ):
        got, expected = (m.forward_intermediates(x, **arguments) for m in (ours, theirs))
        close(got, expected)
    got, expected = (m.get_intermediate_layers(x, 2, True, True, True) for m in (ours, theirs))
    close(got, expected)
    for m in (ours, theirs):
        m.reset_classifier(0)
    close(ours.forward_head(ours.forward_features(x)), theirs(x))


def test_layer_decay_groups_are_timms():
    theirs = timm.create_model("vit_tiny_patch16_224", **SMALL)
    groups = [
        [(group["lr_scale"], group["weight_decay"], len(group["params"])) for group in param_groups_layer_decay(m)]
        for m in (small(), theirs)
    ]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("scheme", ["", "jax", "jax_nlhb", "moco", "reset"])
def test_initialisation_has_timms_distributions(scheme):
    """By the largest distance between the two distribution functions; chance exceeds the bound once in 10^6."""
    torch.manual_seed(3)
    theirs = timm.create_model("vit_tiny_patch16_224", **SMALL, weight_init=scheme).state_dict()
    ours = small(weight_init=scheme).state_dict()
    for key in theirs:
        a, b = ours[key].flatten().sort().values, theirs[key].flatten().sort().values
        if torch.equal(b, b[:1].expand_as(b)):  # zeros, ones, the head's bias
            assert torch.equal(a, b), key
            continue
        places = torch.cat([a, b])
        distance = (torch.searchsorted(a, places, right=True) - torch.searchsorted(b, places, right=True)).abs().max()
        assert distance < 2.7 * (2 * len(a)) ** 0.5, key


@pytest.mark.parametrize("shape", ["uniform", "normal"])
@pytest.mark.parametrize("rule", ["xavier_", "he_", ""])
def test_initialisation_has_the_schemes_deviation(rule, shape):
    """Of every matrix. A mean of n squares has the relative deviation sqrt((kurtosis - 1) / n), at most sqrt(2 / n):
    the normal's kurtosis is 3, the uniform's 1.8. The root of it has half of that; 6 of these are sqrt(18 / n)."""
    torch.manual_seed(3)
    model = small(weight_init=rule + shape)
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        weight = module.weight.detach().double().flatten(1)
        outputs, inputs = weight.shape
        std = {"xavier_": (2 / (inputs + outputs)) ** 0.5, "he_": (2 / inputs) ** 0.5, "": 0.02}[rule]
        assert abs(weight.square().mean().sqrt() / std - 1) < (18 / weight.numel()) ** 0.5, name
        # A uniform number ends at sqrt(3) deviations; a normal one is beyond 2 in 4.6 %: none in 1,000 has p < 1e-20.
        assert (weight.abs().max() <= 3**0.5 * std * (1 + 1e-6)) == (shape == "uniform"), name
        assert module.bias is None or not module.bias.any(), name


def test_a_seed_gives_one_model_and_every_call_another():
    first, second = small(seed=3).state_dict(), vit.create("vit_tiny_patch16_224", **SMALL).state_dict()
    again = small(seed=3).state_dict()
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
        assert torch.equal(value, second[key]) == (not value.any() or bool((value == 1).all())), key
    drawn = {hash(v.numpy().tobytes()) for k, v in first.items() if k.endswith(".weight") and "norm" not in k}
    assert len(drawn) == len([k for k in first if k.endswith(".weight") and "norm" not in k])  # no two are equal
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in first.values())).hexdigest()
    assert digest.startswith("a230b9558f1e5732"), digest  # on every version of PyTorch and every processor


def test_initialisation_elsewhere():
    """Rounded values in other dtypes, none on the meta device and under FakeTensorMode, a new head with its own."""
    state = small(seed=3).state_dict()
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(3)
        other = vit.create("vit_tiny_patch16_224", backend="reference", dtype=dtype, **SMALL).state_dict()
        assert all(torch.equal(value.to(dtype), other[key]) for key, value in state.items())
    torch.manual_seed(3)
    with torch.device("meta"):  # the device of a model is its own argument's
        other = vit.create("vit_tiny_patch16_224", backend="reference", device="cpu", **SMALL)
    assert torch.equal(other.head.weight, state["head.weight"])
    before = torch.get_rng_state()
    assert vit.create("vit_tiny_patch16_224", backend="reference", device="meta", **SMALL).head.weight.is_meta
    with FakeTensorMode():
        fake = vit.create("vit_tiny_patch16_224", backend="reference", **SMALL)
        assert fake(torch.empty(2, 3, 32, 32)).shape == (2, SMALL["num_classes"])
    assert torch.equal(torch.get_rng_state(), before)
    other.reset_classifier(SMALL["num_classes"])
    assert not torch.equal(other.head.weight, state["head.weight"])
    draw.check_deviation(other.head.weight, 0.02)


# ---- options ----


@pytest.mark.parametrize("name", ["vit_digits", "vit_mnist_demo"])
def test_presets_learn(name):
    model = vit.create(name)
    x = images(4, 1, *model.patch_embed.img_size)
    y = torch.tensor([1, 2, 3, 4])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):  # after 20 the loss of every second seed is above the bound
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_mnist_demo_has_the_numbers_of_its_source():
    model = vit.create("vit_mnist_demo")
    assert model(images(2, 1, 28, 28)).shape == (2, 10)
    assert (model.embed_dim, len(model.blocks), model.num_heads, model.patch_embed.num_patches) == (64, 2, 8, 16)
    assert model.blocks[0].mlp.drop1.p == 0.1
    assert model.blocks[0].attn.attn_drop.p == 0.0


@pytest.mark.parametrize(
    "arch",
    [
        {},
        {"patch_size": 4},
        {"patch_size": (8, 4)},
        {"img_size": (16, 40)},
        {"embed_dim": 24, "num_heads": 3},
        {"depth": 1},
        {"mlp_ratio": 1.5},
        {"in_chans": 1},
        {"num_classes": 0},
        {"class_token": False, "global_pool": "avg"},
        {"global_pool": "avg"},
        {"global_pool": ""},
        {"qkv_bias": False},
        {"pos_embed": "sincos2d"},
        {"pos_embed": "none"},
        {"patch_embed": "linear"},
        {"dynamic_pad": True, "img_size": (30, 33)},
        {"act_layer": "gelu_tanh"},
        {"norm_eps": 1e-3},
        {"drop_rate": 0.5},
        {"pos_drop_rate": 0.5},
        {"proj_drop_rate": 0.5},
        {"attn_drop_rate": 0.5},
        {"drop_path_rate": 0.2},
        {"weight_init": "jax"},
        {"dtype": "float64"},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_every_option_trains(arch):
    model = small(backend="auto", **arch)
    x = images(4, model.patch_embed.in_chans, *model.patch_embed.img_size, dtype=model.dtype)
    y = model(x)
    width = model.num_classes or model.embed_dim
    assert y.shape == ((4, 17, width) if model.global_pool == "" else (4, width))
    assert y.dtype == model.dtype
    (y * images(*y.shape, dtype=y.dtype)).sum().backward()
    for name, parameter in model.named_parameters():
        # A zero head ("jax") passes no gradient on; the rest must get one.
        expected = arch.get("weight_init") != "jax" or name.startswith("head")
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert not expected or parameter.grad.abs().max() > 0, name
    model.eval()
    with torch.inference_mode():
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("rate", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropout_is_active_in_training_only(rate):
    model, plain = small(**{rate: 0.5}), small()
    x = images()
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=0)


def test_drop_path_keeps_the_mean_and_whole_samples():
    x = torch.ones(20_000, 3)
    kept = DropPath(0.25)(x)
    assert set(kept.flatten().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (kept == kept[:, :1]).all()
    assert abs(kept.mean() - 1) < 4 * (0.25 / 0.75 / 20_000) ** 0.5  # 4 deviations of a mean
    first, *others = [block.drop_path2 for block in small(depth=5, drop_path_rate=0.4).blocks]
    assert type(first) is nn.Identity  # as in timm
    assert [drop.drop_prob for drop in others] == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("patch_size", [8, (8, 4)])
def test_conv_and_linear_patch_embedding_are_one(patch_size):
    conv, linear = (small(patch_size=patch_size, patch_embed=kind) for kind in ("conv", "linear"))
    assert conv.patch_embed.proj.weight.ndim == 4
    assert linear.patch_embed.proj.weight.ndim == 2
    x = images()
    assert torch.equal(conv(x), linear(x))  # the same seed draws the same weights

    proj = conv.patch_embed.proj
    expected = F.conv2d(x.double(), proj.weight.double(), proj.bias.double(), stride=proj.stride)
    got = conv.double().patch_embed(x.double())
    close(got, expected.flatten(2).transpose(1, 2))

    other = small(seed=9, patch_size=patch_size, patch_embed="linear")
    other.load_state_dict(small(patch_size=patch_size).state_dict())
    assert torch.equal(other(x), linear(x))
    other = small(seed=9, patch_size=patch_size)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), linear(x))


def test_patchify_and_back():
    x = images(2, 3, 12, 20)
    patches = patchify(x, (4, 5))
    assert patches.shape == (2, 12, 60)
    assert torch.equal(patches[1, 4 * 1 + 2].view(3, 4, 5), x[1, :, 4:8, 10:15])  # row 1, column 2
    assert torch.equal(unpatchify(patches, (4, 5), (3, 4)), x)
    with pytest.raises(ValueError, match="12 x 20 are not a multiple of the patch size 5 x 5"):
        patchify(x, 5)
    with pytest.raises(ValueError, match="12 patches of 60 values do not fill a 3 x 3 grid"):
        unpatchify(patches, (4, 5), (3, 3))


def test_sincos_table_is_its_formula():
    table = pos_embed.sincos2d((3, 5), 16, prefix_tokens=1)
    assert table.shape == (1, 16, 16)
    assert not table[0, 0].any()
    f = [10000 ** (-k / 3) for k in range(4)]
    y, x = 2, 4
    angles = (
        torch.tensor([x * w for w in f], dtype=torch.float64),
        torch.tensor([y * w for w in f], dtype=torch.float64),
    )
    expected = torch.cat([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()])
    close(table[0, 1 + y * 5 + x], expected, 0.5)  # rounded once
    model = small(pos_embed="sincos2d")
    assert "pos_embed" not in dict(model.named_parameters())
    assert model.to(torch.float64).pos_embed.dtype == torch.float64


def test_dynamic_pad_pads_with_zeros_below_and_right():
    model = small(img_size=(30, 27), dynamic_pad=True).eval()
    exact = small().eval()
    exact.load_state_dict(model.state_dict())
    x = images(2, 3, 30, 27)
    assert torch.equal(model(x), exact(F.pad(x, (0, 5, 0, 2))))


def test_initial_statistics():
    model = vit.create("vit_small_patch16_224", backend="reference", depth=2)
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith("bias") and "patch_embed" not in key:
            assert not value.any(), key
        elif key.endswith("weight") and "norm" not in key and "patch_embed" not in key:
            draw.check_deviation(value, 0.02, key)
            assert abs(value.mean()) < 4 * 0.02 / value.numel() ** 0.5, key  # 4 deviations of a mean
            assert value.abs().max() <= 0.12, key
    draw.check_deviation(state["pos_embed"], 0.02)
    assert state["cls_token"].abs().max() < 6e-6  # of N(0, 1e-6^2): beyond 6 deviations once in 10^9
    jax = vit.create("vit_small_patch16_224", backend="reference", depth=1, weight_init="jax_nlhb").state_dict()
    assert not jax["head.weight"].any()
    close(jax["head.bias"].exp().sum(), torch.tensor(1.0))
    draw.check_deviation(jax["patch_embed.proj.weight"], (3 * 256) ** -0.5)


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "vit_bas_patch16_224"}, "unknown model 'vit_bas_patch16_224'; nearest: vit_base_patch16_224"),
        ({"embed_dims": 32}, "no argument 'embed_dims'; did you mean embed_dim"),
        ({"banana": 1}, "no argument 'banana'.* Allowed: img_size, patch_size"),
        ({"backend": "gpu"}, "unknown backend 'gpu'; known are auto"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of float32"),
        ({"img_size": 30}, "30 x 30 is no multiple of the patch size 8 x 8; .*dynamic_pad=True"),
        ({"img_size": 0}, r"img_size must be a positive whole number or \(height, width\), got 0"),
        ({"img_size": "32"}, "img_size must be .* got '32'"),
        ({"img_size": (32,)}, r"img_size must be .* got \(32,\)"),
        ({"patch_size": 0}, "patch_size must be .* got 0"),
        ({"patch_size": (8, 8.0)}, r"patch_size must be .* got \(8, 8\.0\)"),
        ({"mlp_ratio": "4"}, "mlp_ratio must be a number from 0, got '4'"),
        ({"mlp_ratio": 0.001}, "mlp_width must be a positive whole number, got 0"),
        ({"norm_eps": -1e-6}, "norm_eps must be a number from 0, got -1e-06"),
        ({"drop_rate": "0.1"}, "drop_rate must be at least 0 and below 1, got '0.1'"),
        ({"num_heads": 5}, "embed_dim 64 is not a multiple of num_heads 5"),
        ({"depth": 0}, "depth must be a positive whole number, got 0"),
        ({"embed_dim": 64.0}, "embed_dim must be a positive whole number, got 64.0"),
        ({"drop_rate": 1.0}, "drop_rate must be at least 0 and below 1, got 1.0"),
        ({"global_pool": "sum"}, "global_pool='sum' is not one of 'token', 'avg', 'avgmax', 'max', 'map', ''"),
        ({"class_token": False}, 'global_pool="token" needs class_token=True'),
        ({"pos_embed": "rope"}, "pos_embed='rope' is not one of 'learned', 'sincos2d', 'sincos1d', 'none'"),
        ({"pos_embed": "sincos2d", "embed_dim": 6, "num_heads": 1}, "multiple of 4 and at least 8, got 6"),
        ({"patch_embed": "fft"}, "patch_embed='fft' is not one of conv, linear"),
        ({"act_layer": "elu"}, "act_layer='elu' is not one of 'gelu', 'gelu_tanh'"),
        ({"weight_init": "he"}, "weight_init='he' is not one of"),
        ({"num_classes": -1}, r"num_classes must be 0 \(features\) or a whole number above, got -1"),
        ({"num_classes": 2.0}, r"num_classes must be 0 .* got 2\.0"),
    ],
    ids=str,
)
def test_bad_arguments_say_what_is_allowed(arguments, words):
    with pytest.raises(ValueError, match=words):
        vit.create(**({"name": "vit_tiny_patch16_224"} | SMALL | arguments))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(3, 32, 32), r"must be \[B, 3, 32, 32\], got \[3, 32, 32\]; add the batch dimension"),
        (torch.zeros(1, 1, 32, 32), "1 channels, the model takes 3$"),
        (torch.zeros(1, 32, 32, 3), "32 channels, the model takes 3; the channels stand last"),
        (torch.zeros(1, 3, 32, 40), "are 32 x 40, the model takes 32 x 32; resize"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8, not normalised floating point; model.preprocess"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "float64, the model's parameters torch.float32; use"),
        (torch.zeros(1, 3, 32, 32, device="meta"), "images are on meta, the model on cpu; use images.to"),
    ],
    ids=["no batch", "grey", "channels last", "size", "bytes", "double", "device"],
)
def test_bad_images_say_what_is_needed(x, words):
    with pytest.raises(ValueError, match=words):
        small()(x)


@pytest.mark.parametrize("x", [np.zeros((1, 3, 32, 32), np.float32), [1.0], None], ids=["array", "list", "None"])
def test_images_must_be_tensors(x):
    what, value = (r"images\[0\]", x[0]) if isinstance(x, list) else ("images", x)
    with pytest.raises(TypeError, match=rf"{what} must be a tensor, got {type(value).__name__}; .*torch\.from_numpy"):
        small()(x)


@pytest.mark.parametrize("backend_name", ["reference", "auto"])
def test_heads_wider_than_any_kernel_takes_run_on_the_reference(backend_name):
    model = small(backend=backend_name, embed_dim=514, num_heads=2)
    assert model.plan["attention"] == "reference"
    model(images()).sum().backward()
    assert torch.isfinite(model.blocks[0].attn.qkv.weight.grad).all()


@pytest.mark.parametrize("name", [name for name in records() if name != "reference"])
def test_an_unusable_backend_says_why_and_what_else_there_is(name, monkeypatch):
    monkeypatch.setattr(records()[name], "unavailable", lambda: "no such device")
    with pytest.raises(BackendError, match=f"'{name}' cannot be used on this machine: no such device") as error:
        vit.create(backend=name, weights="nowhere.safetensors")
    assert "Usable here: " in str(error.value)
    assert "reference" in str(error.value)


def test_blocks_out_of_range():
    with pytest.raises(ValueError, match="indices 3 do not lie in the model's 2 blocks"):
        small().forward_intermediates(images(), 3)
    with pytest.raises(ValueError, match=r"indices \[0, 2\] do not lie"):
        small().forward_intermediates(images(), [0, 2])


# ---- the plan ----


def test_plan_is_said_everywhere():
    model = small(backend="reference")
    assert model.plan == dict.fromkeys(["linear", "layer_norm", "attention", "gelu"], "reference")
    assert "backend='reference' (runs on reference)" in repr(model)
    assert all(op in model.explain() for op in model.plan)


def test_a_model_on_its_own_and_a_block_on_its_own():
    model = VisionTransformer(**SMALL)
    assert set(model.plan) == {"linear", "layer_norm", "attention", "gelu"}
    block = Block(64, 4)
    assert block(draw.randn(2, 5, 64)).shape == (2, 5, 64)


def test_list_models():
    assert vit.list_models() == sorted(CONFIGS)
    assert vit.list_models("deit_tiny*") == ["deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"]
    assert vit.list_models("nothing*") == []


def test_backend_may_be_all_that_is_given():
    model = vit.create(backend="reference", device="meta")
    assert model.name == "vit_base_patch16_224"
    assert model.dtype == torch.float32


def test_created_for_inference():
    model = small(training=False)
    assert not model.training
    assert model.train().training
    assert small().training


# ---- what programs do to models ----


def test_dtype_and_device_changes():
    model = small().eval()
    x = images()
    expected = model(x).detach()
    for change, dtype in [
        (lambda m: m.double(), torch.float64),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.float(), torch.float32),
    ]:
        changed = change(copy.deepcopy(model))
        assert changed.dtype == dtype
        got = changed(x.to(dtype)).detach()
        assert got.dtype == dtype
        close(got, expected)
    assert torch.equal(model.to(memory_format=torch.channels_last)(x), expected)
    assert model.to("meta")(x.to("meta")).shape == (3, 7)
    assert model.to_empty(device="cpu").device.type == "cpu"
    model.share_memory()


def test_autocast_takes_float32_images():
    model, x = small(), images()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert torch.isfinite(y).all()
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    close(y, model(x))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(copied):
    model, x = small(backend="auto"), images()
    other = copied(model)
    assert torch.equal(other(x), model(x))
    assert other.plan == model.plan
    with torch.no_grad():
        other.head.bias.add_(1)
    assert not torch.equal(other(x), model(x))


def _logits_in_child(model: VisionTransformer, x: Tensor, queue) -> None:
    torch.set_num_threads(1)
    queue.put(model(x).detach().numpy())


def test_spawned_process_has_the_same_logits():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    model, x = small(backend="auto").eval(), images()
    child = context.Process(target=_logits_in_child, args=(model, x, queue))
    child.start()
    got = torch.from_numpy(queue.get(timeout=120))
    child.join(30)
    assert child.exitcode == 0
    assert torch.equal(got, model(x))


@pytest.mark.parametrize("how", ["load_state_dict", "assign", "data.copy_", "optimizer"])
def test_changed_weights_change_the_output(how):
    model, x = small(backend="auto"), images()
    before = model(x).detach()
    expected = None
    if how in ("load_state_dict", "assign"):
        other = small(seed=5)
        model.load_state_dict(other.state_dict(), assign=how == "assign")
        expected = other(x).detach()
    elif how == "data.copy_":
        other = small(seed=6)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data.copy_(theirs.data)
        expected = other(x).detach()
    else:
        model(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    after = model(x).detach()
    assert not torch.allclose(after, before, atol=1e-3)
    if expected is not None:
        close(after, expected)


def test_assigned_weights_bring_their_dtype_and_the_plan_follows():
    model = small()
    model.load_state_dict(small(dtype="float64").state_dict(), assign=True)
    assert model.dtype == torch.float64
    assert model(images(dtype=torch.float64)).dtype == torch.float64


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, saving, x = small(), small(), images()
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model(x).square().sum().backward()
    for mine, theirs in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_new_classifier():
    model, x = small(), images()
    model.class_names = tuple("abcdefg")
    model.reset_classifier(3)
    assert model(x).shape == (3, 3)
    assert model.class_names is None
    assert model.get_classifier() is model.head
    draw.check_deviation(model.head.weight, 0.02)
    model.reset_classifier(0, "avg")
    assert torch.equal(model(x), model.forward_features(x)[:, 1:].mean(1))
    with pytest.raises(ValueError, match="needs class_token=True"):
        small(class_token=False, global_pool="avg").reset_classifier(3, "token")


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batches(batch):
    assert small(backend="auto")(images(batch, 3, 32, 32)).shape == (batch, 7)


def tokens_of_last_block(model):
    """How many tokens the MLP of the last block is given, by a wrapper of the op that no hook announces."""
    seen, mlp = [], model.blocks[-1].mlp
    own, real = mlp.fc1.weight, model.ops

    def linear(x, weight, *args):
        if weight is own:
            seen.append(x.shape[1])
        return real.linear(x, weight, *args)

    parts = [module for module in model.modules() if isinstance(module, CallsOps)]
    for part in parts:
        part.ops = SimpleNamespace(**vars(real) | {"linear": linear})
    try:
        logits = model(images())
    finally:
        for part in parts:
            part.ops = real
    return seen, logits


def test_the_last_block_computes_what_the_logits_need():
    model = small(backend="auto")
    seen, logits = tokens_of_last_block(model)
    assert seen == [1]
    assert torch.equal(logits, model.forward_head(model.forward_features(images())))
    assert model.forward_features(images()).shape[1] == 17
    assert tokens_of_last_block(small(backend="auto", global_pool="avg"))[0] == [17]


class OwnFeatures(VisionTransformer):
    def forward_features(self, images):
        return super().forward_features(images) * 0


@pytest.mark.parametrize("place", ["norm", "blocks.1", "blocks.1.norm2", "blocks.1.mlp.fc2"])
@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_see_all_tokens(place, register):
    model = small(backend="auto")
    handle = getattr(model.get_submodule(place), f"register_{register}")(lambda *args: None)
    assert tokens_of_last_block(model)[0] == [17]
    handle.remove()
    assert tokens_of_last_block(model)[0] == [1]


def test_global_hooks_and_foreign_blocks_see_all_tokens():
    model = small(backend="auto")
    seen, last = [], model.blocks[-1].mlp.fc1
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: seen.append(args[0].shape[1]) if module is last else None
    )
    try:
        model(images())
    finally:
        handle.remove()
    assert seen == [17]

    class Foreign(nn.Module):
        def forward(self, x):
            return x.flip(1)

    model.blocks[1] = Foreign()
    assert torch.equal(model(images()), model.forward_head(model.forward_features(images())))
    own = OwnFeatures(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=7)
    assert own(images()).equal(own.head.bias.expand(3, -1))


def test_hooks_and_frozen_parameters():
    model, seen = small(backend="auto"), []
    model.blocks[1].mlp.fc1.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    model.blocks.requires_grad_(False)
    model(images()).sum().backward()
    assert seen == [(3, 17, 256)]
    assert all(p.grad is None for p in model.blocks.parameters())
    assert model.patch_embed.proj.weight.grad is not None


def test_refused_change_leaves_the_model_whole(monkeypatch):
    model, x = small(), images()
    before = model(x).detach()
    refuse = BackendError("vit: refused")

    def make_plan(*args):
        raise refuse

    monkeypatch.setattr("vit.model.planned.make_plan", make_plan)
    with pytest.raises(BackendError, match="refused"):
        model.double()
    assert model.dtype == torch.float32
    assert torch.equal(model(x), before)
