"""Live models of timm, transformers and torchvision: as vit's own with the same weights, and with vit's ops in them."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import re
import warnings
from pathlib import Path

import draw
import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
import vit
from conftest import USABLE
from rounding import close
from timm.layers import GluMlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vit.weights import WeightsError

native = pytest.mark.skipif("cpu" not in USABLE, reason="needs the cpu backend")

T = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
DINOV3 = {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True}
TIMM = {
    "plain": (VisionTransformer, {}),
    "dinov2": (VisionTransformer, {"init_values": 0.1, "reg_tokens": 2, "no_embed_class": True, "img_size": (16, 24)}),
    "swiglu": (VisionTransformer, {"mlp_layer": GluMlp, "act_layer": nn.SiLU, "qkv_bias": False, "qk_norm": True}),
    "siglip": (VisionTransformer, {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}),
    "clip": (VisionTransformer, {"pre_norm": True, "act_layer": "quick_gelu", "global_pool": "avg", "img_size": 20}),
    "tanh": (VisionTransformer, {"act_layer": functools.partial(nn.GELU, approximate="tanh")}),
    "eps": (
        VisionTransformer,
        {"norm_layer": nn.LayerNorm, "embed_norm_layer": functools.partial(nn.LayerNorm, eps=1e-2)},
    ),
    "rms": (VisionTransformer, {"norm_layer": "rmsnorm", "fc_norm": False, "global_pool": "avgmax"}),
    "distilled": (VisionTransformerDistilled, {"drop_path_rate": 0.1, "drop_rate": 0.1}),
    "eva02": (Eva, {"swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (2, 2)}),
    "dinov3": (Eva, DINOV3 | {"swiglu_mlp": True, "swiglu_align_to": 8, "num_reg_tokens": 2, "init_values": 0.1}),
    "rope": (Eva, {"attn_type": "rope", "use_rot_pos_emb": True, "rope_type": "mixed", "global_pool": "token"}),
}


def noisy(model: nn.Module, name: str) -> nn.Module:
    draw.restart("fronts", name)
    for parameter in model.parameters():
        draw.normal_(parameter, std=0.2)
    return model.eval()


def timm_model(name: str = "plain", **more) -> nn.Module:
    kind, arguments = TIMM[name]
    if arguments.get("mlp_layer") is GluMlp:
        arguments = arguments | {"mlp_layer": timm.layers.SwiGLUPacked}
    return noisy(kind(**(T | arguments | more)), name)


def torchvision_model() -> nn.Module:
    return noisy(torchvision.models.VisionTransformer(16, 8, 2, 2, 32, 64, num_classes=5), "torchvision")


def images_for(model: nn.Module, count: int = 2) -> Tensor:
    side = getattr(getattr(model, "patch_embed", None), "img_size", (16, 16))
    return draw.randn(count, 3, *side)


def run(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradients of the images and of every parameter."""
    images = images.clone().requires_grad_()
    model.zero_grad()
    y = model(images)
    y = getattr(y, "logits", y)
    y.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return y.detach(), found | {"images": images.grad}


def agree(got: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    close(got[0], wanted[0])
    # Some true gradients are 0 (of the keys' bias): the noise is that of all.
    close(got[1], wanted[1], largest=max(float(one.abs().max()) for one in wanted[1].values() if one.numel()))


# ---- from_timm ----


@pytest.mark.parametrize("name", TIMM)
def test_a_timm_model_becomes_vits_with_the_same_parameters(name):
    theirs = timm_model(name)
    ours = vit.from_timm(theirs)
    images = images_for(theirs)
    agree(run(ours, images), run(theirs, images))
    live = dict(theirs.named_parameters())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(parameter is live[key] for key, parameter in ours.named_parameters())
    report = vit.weights.report(ours)
    assert {one.how for one in report.mapped} == {"as it is, shared"}
    assert len(report.mapped) == len(theirs.state_dict())
    assert ours.preprocess.img_size == tuple(theirs.patch_embed.img_size)


def test_a_named_timm_model_brings_its_name_and_preprocessing():
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=7)
    theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["crop_pct"] = (0.1, 0.2, 0.3), 0.75
    ours = vit.from_timm(theirs)
    assert ours.name == "vit_tiny_patch16_224"
    assert (ours.preprocess.mean, ours.preprocess.crop_pct) == ((0.1, 0.2, 0.3), 0.75)
    assert ours.preprocess.img_size == (32, 32)


def test_modes_switches_and_dtype_are_kept():
    theirs = timm_model("plain", dtype=torch.float64).train()
    theirs.blocks[0].eval()
    theirs.blocks[1].attn.fused_attn = False
    theirs.patch_embed.requires_grad_(False)
    ours = vit.from_timm(theirs)
    assert ours.dtype == torch.float64
    assert ours.training
    assert ours.blocks[1].mlp.training
    assert not ours.blocks[0].mlp.training
    assert not ours.blocks[1].attn.fused_attn
    frozen = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert [p.requires_grad for p in theirs.parameters()] == [p.requires_grad for p in ours.parameters()]


def test_tied_parameters_stay_tied():
    theirs = timm_model()
    theirs.blocks[1].attn.qkv.weight = theirs.blocks[0].attn.qkv.weight
    ours = vit.from_timm(theirs)
    assert ours.blocks[1].attn.qkv.weight is ours.blocks[0].attn.qkv.weight is theirs.blocks[0].attn.qkv.weight


def _hook(model):
    model.blocks[1].attn.qkv.register_forward_hook(lambda *_: None)


def _forward(model):
    model.blocks[1].mlp.forward = model.blocks[1].mlp.forward


def _module(model):
    model.blocks[0].mlp.act = nn.ReLU()


def _another(model):
    model.adapter = nn.Linear(2, 2)


def _foreign(model):
    model.blocks[0].norm1 = type("Norm", (nn.LayerNorm,), {"forward": lambda self, x: x})(32)


def _eps(model):
    model.blocks[1].norm2.eps = 0.5


def _dropout(model):
    model.blocks[1].attn.proj_drop.p = 0.5


def _parametrized(model):
    nn.utils.parametrizations.weight_norm(model.head)


def _dtypes(model):
    model.head.double()


def _heads(model):
    model.blocks[1].attn.num_heads, model.blocks[1].attn.head_dim = 4, 8


REFUSED = {
    _hook: r"blocks\.1\.attn\.qkv \(Linear\) has a hook",
    _forward: r"blocks\.1\.mlp \(Mlp\) has a forward of its own",
    _module: r"ReLU",
    _another: r"a module adapter \(Linear\) that is not known",
    _foreign: r"blocks\.0\.norm1 \(Norm\) has code of",
    _eps: r"blocks\.1\.norm2\.eps is 0\.5",
    _dropout: r"blocks\.1\.attn\.proj_drop\.p is 0\.5",
    _parametrized: r"head \(Parametrized\w+\) is parametrized",
    _dtypes: r"cls_token is float32 and head\.weight float64",
    _heads: r"blocks\.1\.attn\.num_heads is 4",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__[1:])
def test_what_vits_model_would_not_have_is_refused_by_name(change):
    theirs = timm_model()
    change(theirs)
    with pytest.raises(WeightsError, match=REFUSED[change]):
        vit.from_timm(theirs)


def test_options_and_classes_that_are_not_known_are_refused_by_name():
    with pytest.raises(WeightsError, match=r"GatedMlp|mlp"):
        vit.from_timm(VisionTransformer(**T, mlp_layer=timm.layers.GatedMlp))
    with pytest.raises(WeightsError, match="global_pool='prr'"):
        vit.from_timm(VisionTransformer(**T, global_pool="prr"))
    with pytest.raises(TypeError, match=r"pass what is in it: model\.module"):
        vit.from_timm(nn.DataParallel(timm_model()))
    with pytest.raises(TypeError, match=r"got timm\.models\.resnet\.ResNet"):
        vit.from_timm(timm.create_model("test_resnet"))
    with pytest.raises(WeightsError, match=r"undo\(\) that first"), vit.patch(model := timm_model()):
        vit.from_timm(model)


# ---- from_transformers ----

S = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
C = S | {"image_size": 16, "patch_size": 8}
#: Class -> config, its arguments, what is compared with the output of ours.
CLASSES = {
    "ViTForImageClassification": ("ViTConfig", C | {"num_labels": 5}, "logits"),
    "Dinov2Model": ("Dinov2Config", C | {"use_swiglu_ffn": True}, "last_hidden_state"),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", C | {"num_register_tokens": 3}, "last_hidden_state"),
    "DINOv3ViTModel": ("DINOv3ViTConfig", C | {"use_gated_mlp": True, "hidden_act": "silu"}, "last_hidden_state"),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", C | {"projection_dim": 6}, "image_embeds"),
    "SiglipVisionModel": ("SiglipVisionConfig", C, "pooler_output"),
    "Aimv2VisionModel": ("Aimv2VisionConfig", C, "last_hidden_state"),
}


@pytest.fixture(scope="module")
def hf():
    found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    return found


def hf_model(hf, name: str = "ViTForImageClassification", **more) -> nn.Module:
    config, arguments, _ = CLASSES[name]
    return noisy(getattr(hf, name)(getattr(hf, config)(**(arguments | more))), name)


def outputs(theirs: nn.Module, ours: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    what = CLASSES[name][2]
    with torch.no_grad():
        expected = getattr(theirs(pixel_values=images, output_hidden_states=True), what)
        return ours.forward_features(images) if what == "last_hidden_state" else ours(images), expected


@pytest.mark.parametrize("name", CLASSES)
def test_a_transformers_model_becomes_vits(name, hf):
    theirs = hf_model(hf, name)
    images = draw.randn(2, 3, 16, 16)
    theirs(pixel_values=images, output_hidden_states=True)  # leaves hooks of transformers' own
    ours = vit.from_transformers(theirs)
    close(*outputs(theirs, ours, name, images))
    live = {id(parameter) for parameter in theirs.parameters()}
    report = vit.weights.report(ours)
    for one in report.mapped:
        shared = [id(p) in live for n, p in ours.named_parameters() if n in one.targets]
        assert all(shared) if one.how.endswith(", shared") else one.how.endswith(", a copy") and not any(shared)
    norms = [one for one in report.mapped if one.targets == ("blocks.0.norm1.weight",)]
    assert [one.how for one in norms] == ["renamed, shared"]
    joined = [one for one in report.mapped if one.targets == ("blocks.0.attn.qkv.weight",)]
    assert [one.how for one in joined] == ["stacked, a copy"]


def test_modes_and_the_processor_are_taken_along(hf):
    theirs = hf_model(hf).train()
    theirs.vit.layers[0].requires_grad_(False)
    processor = hf.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    ours = vit.from_transformers(theirs, processor)
    assert ours.training
    assert ours.preprocess.mean == pytest.approx((0.1, 0.2, 0.3))
    frozen = {name.rpartition(".")[0] for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert frozen == {f"blocks.0.{part}" for part in parts}


def test_transformers_models_that_are_something_else_are_refused_by_name(hf):
    theirs = hf_model(hf)
    theirs.vit.layers[1].mlp.activation_fn = nn.ReLU()
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.activation_fn is a ReLU"):
        vit.from_transformers(theirs)
    theirs = hf_model(hf)
    theirs.vit.layers[1].layernorm_after.eps = 0.5
    with pytest.raises(WeightsError, match=r"layernorm_after\.eps is 0\.5"):
        vit.from_transformers(theirs)
    theirs = hf_model(hf)
    theirs.vit.layers[0].attention.q_proj.requires_grad_(False)
    with pytest.raises(WeightsError, match=r"q_proj.* some are frozen"):
        vit.from_transformers(theirs)
    with pytest.raises(TypeError, match="from_transformers takes a ViT of transformers"):
        vit.from_transformers(timm_model())


# ---- patch ----


LIVE = [*(f"timm-{name}" for name in TIMM), "torchvision", *(f"transformers-{name}" for name in CLASSES)]


def live(name: str, request: pytest.FixtureRequest) -> nn.Module:
    library, _, name = name.partition("-")
    if library == "timm":
        return timm_model(name)
    return torchvision_model() if library == "torchvision" else hf_model(request.getfixturevalue("hf"), name)


class Logits(nn.Module):
    """A model of transformers as one of images -> tensor."""

    def __init__(self, model: nn.Module, what: str) -> None:
        super().__init__()
        self.model, self.what = model, what

    def forward(self, images: Tensor) -> Tensor:
        return getattr(self.model(pixel_values=images), self.what)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", LIVE)
def test_a_patched_model_gives_the_same_and_undo_gives_the_model_back(name, training, request):
    model = live(name, request).train(training)
    if name.startswith("transformers"):
        model = Logits(model, CLASSES[name.partition("-")[2]][2])
    images = images_for(model)
    torch.manual_seed(1)
    before = run(model, images)
    types = {key: type(module) for key, module in model.named_modules()}
    names, parameters = list(model.state_dict()), list(model.parameters())

    report = vit.patch(model)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(module, types[key]) for key, module in model.named_modules())
    torch.manual_seed(1)
    agree(run(model, images), before)

    report.undo()
    report.undo()
    assert {key: type(module) for key, module in model.named_modules()} == types
    torch.manual_seed(1)
    after = run(model, images)
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[1][key], gradient) for key, gradient in before[1].items())


class Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


ATEN = {"addmm", "mm", "bmm", "native_layer_norm", "gelu", "silu", "convolution", "linear"}


@native
@pytest.mark.parametrize(
    "name", ["timm-plain", "timm-swiglu", "timm-siglip", "torchvision", "transformers-Dinov2Model"]
)
def test_the_arithmetic_is_our_kernels(name, request):
    model = live(name, request)
    with vit.patch(model, "cpu"), torch.no_grad(), Called() as called:
        model(images_for(model))
    assert "vit_cpu::attention_fwd" in called.names
    found = {one.partition("::")[2].partition(".")[0] for one in called.names}
    assert not found & ATEN
    assert not any("scaled_dot_product" in one for one in found)


@native
def test_the_report_says_what_was_swapped_and_what_not_and_why():
    model = timm_model("dinov2", attn_drop_rate=0.25)
    model.blocks[1].attn.fused_attn = False
    model.head.forward = model.head.forward
    nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc2)
    report = vit.patch(model)
    swapped = {one.name: one for one in report.swapped}
    assert swapped["blocks.0.attn"].ops == ("attention",)
    assert swapped["blocks.0.attn"].backend == "cpu"
    assert "dropout 0.25" in swapped["blocks.0.attn"].note
    assert swapped["blocks.0.mlp"].ops == ("linear", "gelu")
    assert swapped["patch_embed.proj"].ops == ("linear",)
    left = {one.name: one.reason for one in report.left}
    assert "fused_attn is False" in left["blocks.1.attn"]
    assert left["head"] == "it has a forward of its own"
    assert left["blocks.0.mlp.fc2"] == "it is parametrized"
    assert left["blocks.0.attn.attn_drop"] == "random numbers in training, which stay PyTorch's"
    assert swapped["blocks.0"].ops == ("linear", "attention", "gelu")
    assert not swapped.keys() & left.keys()
    assert json.loads(json.dumps(report.to_dict()))["left"][0].keys() == {"name", "kind", "reason"}
    assert "blocks.*.norm1" in str(report)
    again = vit.patch(model)
    assert not again.swapped
    assert {one.reason for one in again.left if one.name == "norm"} == {"swapped before, for backend 'auto'"}


@native
def test_what_no_kernel_runs_is_left_with_the_reason():
    half = vit.patch(timm_model("plain", dtype=torch.float16), "cpu")
    assert not half.swapped
    assert {"dtype float16 is not one of" in one.reason for one in half.left} == {True}
    wide = vit.patch(timm_model("plain", embed_dim=520, num_heads=2))
    assert {"head dimension 260" in one.reason for one in wide.left if one.kind == "Attention"} == {True}
    assert any(one.kind == "Linear" for one in wide.swapped)


@native
def test_another_attention_function_of_transformers_is_left(hf):
    model = hf_model(hf)
    model.set_attn_implementation("eager")
    left = {one.kind: one.reason for one in vit.patch(model).left}
    assert "attention function is 'eager'" in left["ViTAttention"]


@torch.no_grad()
def test_masks_and_probabilities_are_computed_by_the_models_own_code():
    block, x = timm_model().blocks[0], draw.randn(2, 5, 32)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = block(x, attn_mask=mask), block(x, is_causal=True)
    attention = torchvision_model().encoder.layers[0].self_attention
    weights = attention(x, x, x)
    with vit.patch(block), vit.patch(attention):
        close(block(x, attn_mask=mask), expected[0])
        close(block(x, is_causal=True), expected[1])
        close(attention(x, x, x)[1], weights[1])
        close(attention(x, x, x, need_weights=False)[0], weights[0])


@torch.no_grad()
def test_hooks_see_and_change_what_they_did():
    model = timm_model()
    images, seen = images_for(model), []
    for name in ("blocks.0.mlp.act", "blocks.0.attn.qkv", "blocks.1.mlp.fc1"):
        model.get_submodule(name).register_forward_hook(lambda module, inputs, y: seen.append(y) or 2 * y)
    expected, count = model(images), len(seen)
    with vit.patch(model):
        close(model(images), expected)
    assert len(seen) == 2 * count == 6
    close(seen[count:], seen[:count])


def test_copies_and_pickles_stay_patched_and_apart():
    model, images = timm_model(), None
    images = images_for(model)
    with vit.patch(model):
        expected, made = model(images), type(model.head)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one in copies:
        assert type(one.head) is made
        assert type(model.head) is nn.Linear
        assert torch.equal(one(images), expected)
        one.head.weight.data.zero_()
    assert not torch.equal(model.head.weight, copies[0].head.weight)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dinov2", "swiglu"])
def test_autocast(name, dtype):
    model = timm_model(name)
    images = images_for(model)
    exact = model(images)
    with torch.autocast("cpu", dtype):
        theirs = model(images)
        with vit.patch(model):
            ours = model(images)
    assert ours.dtype == theirs.dtype == dtype
    bound = 2 * float((theirs - exact).abs().max()) + torch.finfo(dtype).eps * float(exact.abs().max())
    assert float((ours - exact).abs().max()) <= bound


def test_transforms_of_torch_func_are_computed_by_pytorch():
    model = timm_model()
    images, parameters = images_for(model), dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (images,)).square().sum()

    expected = torch.func.grad(loss)(parameters)["head.weight"]
    with vit.patch(model):
        assert torch.equal(torch.func.grad(loss)(parameters)["head.weight"], expected)


def test_torch_compile():
    block, x = timm_model("dinov2").blocks[0], draw.randn(2, 5, 32)
    expected = run(block, x)
    with vit.patch(block):
        got = run(torch.compile(block, backend="eager", fullgraph=True), x)
    agree((got[0], {key.removeprefix("_orig_mod."): value for key, value in got[1].items()}), expected)


@torch.no_grad()
def test_torch_compile_of_transformers_attention(hf):
    attention, x = hf_model(hf).vit.layers[0].attention, draw.randn(2, 5, 16)
    expected = attention(x)[0]
    with vit.patch(attention):
        close(torch.compile(attention, backend="eager", fullgraph=True)(x)[0], expected)


def test_under_distributed_data_parallel():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = timm_model()
        images = images_for(model)
        expected = run(model, images)
        wrapped = nn.parallel.DistributedDataParallel(model)
        with vit.patch(wrapped) as report:
            assert any(one.name == "module.head" for one in report.swapped) == ("cpu" in USABLE)
            got = run(wrapped, images)
        agree((got[0], {key.removeprefix("module."): value for key, value in got[1].items()}), expected)
    finally:
        dist.destroy_process_group()


def test_what_cannot_be_patched_or_undone_is_refused_by_name():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got dict"):
        vit.patch({})
    with pytest.raises(TypeError, match="vit's own model"):
        vit.patch(vit.from_timm(timm_model()))
    with pytest.raises(ValueError, match="unknown backend 'cpuu'"):
        vit.patch(timm_model(), "cpuu")
    if missing := [name for name, record in vit.backends().items() if not record["available"]]:
        with pytest.raises(vit.BackendError, match="cannot be used on this machine"):
            vit.patch(timm_model(), missing[0])


def test_what_has_no_code_of_its_own_or_is_vits_is_left():
    with warnings.catch_warnings():  # newer versions of torch warn that TorchScript is old
        warnings.simplefilter("ignore")
        script = torch.jit.script(nn.Linear(5, 5))
    model = nn.Sequential(vit.from_timm(timm_model()), nn.Linear(5, 5), script)
    report = vit.patch(model)
    left = {one.name: one.reason for one in report.left}
    assert left["0"] == "vit's own model, whose ops are its own already"
    assert left["2"] == "TorchScript holds no Python code to change"
    assert {one.name for one in report.swapped} <= {"1"}


@native
def test_undo_after_another_change_of_class_changes_nothing():
    model = timm_model()
    report = vit.patch(model)
    nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(ValueError, match=r"head was given another class"):
        report.undo()
    assert type(model.norm) is not type(timm_model().norm)
    nn.utils.parametrize.remove_parametrizations(model.head, "weight")
    report.undo()
    assert type(model.head) is nn.Linear


def test_the_reference_backend_changes_nothing():
    model = timm_model()
    images = images_for(model)
    expected = model(images)
    with vit.patch(model, "reference"):
        assert torch.equal(model(images), expected)


# ---- the page ----

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: re.findall(r"vit\.\w+", code)[0])
def test_the_examples_of_the_page_run(code, tmp_path, monkeypatch, capsys):
    for module in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    if "dinov2_vits14" in code:  # the names of the release are timm's, with a mask beside them
        made = vit.create("vit_small_patch14_dinov2", img_size=224, backend="reference", device="meta")
        state = {name: torch.zeros(tensor.shape) for name, tensor in made.state_dict().items()}
        torch.save(state | {"mask_token": torch.zeros(1, 384)}, "dinov2_vits14_pretrain.pth")
    exec(compile(code, str(PAGE), "exec"), {})
