"""A model is what its modules say: hooks, adapters, wrappers and replaced parts see and do what they would in timm."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import draw
import pytest
import timm
import torch
import vit
from conftest import USABLE
from rounding import close
from test_model_backends import Watch, forbidden
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.nn.utils import parametrizations, parametrize, prune
from vit.model.layers import DropPath
from vit.preprocess import Preprocess
from vit.support.random import normal

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
BACKENDS = ["reference", *USABLE]


def pair(backend: str = "reference", training: bool = False, **arch: Any) -> tuple[nn.Module, nn.Module]:
    """timm's model and ours, with the same weights, none of them at zero or one."""
    theirs = timm.create_model(NAME, **(SMALL | arch))
    for parameter in theirs.parameters():
        draw.normal_(parameter, std=0.2)
    for block in theirs.blocks:  # ours draws other numbers for the same seed
        for place in ("drop_path1", "drop_path2"):
            if isinstance(drop := getattr(block, place), timm.layers.DropPath):
                setattr(block, place, DropPath(drop.drop_prob))
    ours = vit.create(NAME, backend=backend, device="cpu", **(SMALL | arch))
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(training), ours.train(training)


def images(requires_grad: bool = False) -> Tensor:
    """The same ones at every call."""
    return normal((2, 3, 32, 32), "images").requires_grad_(requires_grad)


def names() -> list[str]:
    return [name for name, _ in timm.create_model(NAME, **SMALL).named_modules()]


@contextmanager
def recorded(model: nn.Module, only: str | None = None, globally: bool = False) -> Iterator[list[tuple[str, Any, Any]]]:
    """(name, input, output) of every call of a module."""
    calls: list[tuple[str, Any, Any]] = []
    named = {module: name for name, module in model.named_modules()}

    def keep(module: nn.Module, args: Any, y: Any) -> None:
        if module in named:
            calls.append((named[module], args[0].detach().clone(), y.detach().clone()))

    if globally:
        handles = [everywhere.register_module_forward_hook(keep)]
    else:
        handles = [m.register_forward_hook(keep) for m, name in named.items() if only in (None, name)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def same_calls(got: list[tuple[str, Any, Any]], expected: list[tuple[str, Any, Any]]) -> None:
    assert [name for name, _, _ in got] == [name for name, _, _ in expected]
    for (name, x, y), (_, their_x, their_y) in zip(got, expected, strict=True):
        close(x, their_x, what=f"input of {name}")
        close(y, their_y, what=f"output of {name}")


# ---- hooks ----


def test_modules_are_timms():
    theirs, ours = pair(drop_path_rate=0.1)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    of_torch = (nn.Linear, nn.Conv2d, nn.GELU, nn.Dropout, nn.Identity, nn.Sequential)
    for name, module in theirs.named_modules():
        if type(module) in of_torch:  # exactly: tools ask so
            assert type(ours.get_submodule(name)) is type(module), name
        if isinstance(module, nn.LayerNorm):
            assert type(ours.get_submodule(name)) is nn.LayerNorm, name


@pytest.mark.parametrize("globally", [False, True], ids=["hooks", "global hook"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "arch",
    [
        {},
        {"drop_path_rate": 0.5, "proj_drop_rate": 0.3, "pos_drop_rate": 0.1, "drop_rate": 0.2},
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "avg", "qkv_bias": False},
        {"global_pool": "", "act_layer": "gelu_tanh"},
    ],
    ids=str,
)
def test_every_module_sees_and_gives_timms_tensors(name, training, globally, arch):
    theirs, ours = pair(name, training, **arch)
    seen = []
    for model in (theirs, ours):
        torch.manual_seed(3)  # what is dropped
        with recorded(model, globally=globally) as calls:
            logits = model(images())
        seen.append((calls, logits))
    (expected, their_logits), (got, logits) = seen
    same_calls(got, expected)
    close(logits, their_logits)


@pytest.mark.parametrize("name", BACKENDS)
def test_attention_dropout_too(name):
    if name != "reference":
        pytest.skip("no native backend has it")
    theirs, ours = pair(training=True, attn_drop_rate=0.3)
    seen = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        with recorded(model) as calls:
            model(images())
        seen.append(calls)
    same_calls(seen[1], seen[0])


@pytest.mark.parametrize("place", names())
@pytest.mark.parametrize("name", BACKENDS)
def test_one_hook_alone_sees_timms_tensors(name, place):
    theirs, ours = pair(name)
    without = ours(images())
    for model in (theirs, ours):
        with recorded(model, place) as calls:
            logits = model(images())
        if model is theirs:
            expected = calls
    same_calls(calls, expected)
    close(logits, without)


@pytest.mark.parametrize(
    "place", ["", "blocks", "blocks.0", "blocks.1", "blocks.1.attn", "blocks.0.mlp.fc1", "norm", "head"]
)
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_hook_returns_is_used(name, kind, place):
    logits = []
    for model in pair(name):
        module = model.get_submodule(place)
        if kind == "forward_hook":
            module.register_forward_hook(lambda module, args, y: y * 0.5)
        else:
            module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        logits.append(model(images()))
    close(logits[1], logits[0])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BACKENDS)
def test_backward_hooks_see_timms_gradients(name, training):
    seen = []
    for model in pair(name, training, drop_path_rate=0.5, proj_drop_rate=0.3):
        calls: list[tuple[str, Any]] = []
        for path, module in model.named_modules():
            if path != "blocks.0.drop_path1":  # an Identity returns its input, whose gradient PyTorch gives to both
                module.register_full_backward_hook(
                    lambda module, dx, dy, path=path, calls=calls: calls.append((path, (dx, dy)))
                )
        torch.manual_seed(3)
        model(images(requires_grad=True)).square().sum().backward()
        seen.append((dict(calls), {n: p.grad for n, p in model.named_parameters()}))
    (expected, their_grads), (got, grads) = seen
    close(got, expected, what="gradients at")
    close(grads, their_grads, what="gradients of")


@pytest.mark.parametrize("name", BACKENDS)
def test_checkpointing_with_hooks_is_timms(name):
    seen = []
    for model in pair(name, training=True):
        model.set_grad_checkpointing()
        with recorded(model, "blocks.1.mlp") as calls:
            model(images()).sum().backward()
        seen.append((calls, model.blocks[0].attn.qkv.weight.grad))
    same_calls(seen[1][0], seen[0][0])
    close(seen[1][1], seen[0][1])


def test_probabilities_can_be_looked_at_as_in_timm():
    seen = []
    for model in pair():
        for block in model.blocks:
            block.attn.fused_attn = False
        with recorded(model, "blocks.1.attn.attn_drop") as calls:
            model(images())
        seen.append(calls)
    assert seen[1][0][2].shape == (2, 2, 17, 17)
    same_calls(seen[1], seen[0])


@pytest.mark.parametrize(
    "place", ["blocks.0.attn.proj", "blocks.1.mlp.act", "patch_embed.proj", "norm", "head", "blocks.0"]
)
@pytest.mark.parametrize("name", USABLE)
def test_a_hooked_model_still_runs_on_its_backend(name, place):
    model = pair(name, training=True)[1]
    model.get_submodule(place).register_forward_hook(lambda module, args, y: y + 0)
    with Watch() as watch:
        model(images()).sum().backward()
    assert not forbidden(watch.seen)


def test_features_by_torchvision_are_timms():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    places = ["blocks.0.attn.qkv", "blocks.0.mlp.act", "blocks.1.attn.proj", "head"]
    theirs, ours = (feature_extraction.create_feature_extractor(m, places)(images()) for m in pair())
    close(ours, theirs)


# ---- replaced modules ----


class Wrapper(nn.Module):
    """Takes one tensor and nothing else."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(x) * 1.5


class TimmWrapper(Wrapper):
    """What timm's blocks give to attention."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        return self.wrapped(x) * 1.5


def put(model: nn.Module, place: str, module: nn.Module) -> None:
    above, _, last = place.rpartition(".")
    setattr(model.get_submodule(above), last, module)


def logits_of_pair(name: str, change: Callable[[nn.Module], Any], training: bool = False, **arch: Any) -> list[Tensor]:
    logits = []
    for model in pair(name, training, **arch):
        torch.manual_seed(5)
        changed = change(model)
        torch.manual_seed(6)
        logits.append((model if changed is None else changed)(images()))
    return logits


@pytest.mark.parametrize(
    "place", [name for name in names() if name not in ("", "blocks.0.attn.attn_drop", "blocks.1.attn.attn_drop")]
)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_wrapper_around_any_module(name, place):
    wrapper = TimmWrapper if place.endswith(("attn", "blocks.0", "blocks.1")) else Wrapper
    theirs, ours = logits_of_pair(name, lambda m: put(m, place, wrapper(m.get_submodule(place))))
    close(ours, theirs, what=place)


REPLACEMENTS = {
    "blocks.0.attn.qkv": lambda: nn.Linear(32, 96, bias=False),
    "blocks.0.attn.proj": lambda: nn.Linear(32, 32),
    "blocks.0.mlp.fc1": lambda: nn.Linear(32, 128),
    "blocks.0.mlp.fc2": lambda: nn.Linear(128, 32),
    "blocks.1.mlp.fc2": lambda: nn.Sequential(nn.Linear(128, 8), nn.Linear(8, 32)),
    "blocks.1.mlp.act": lambda: nn.ReLU(),
    "blocks.0.mlp.act": lambda: nn.GELU(approximate="tanh"),
    "blocks.0.mlp.norm": lambda: nn.LayerNorm(128),
    "blocks.0.mlp": lambda: nn.Sequential(nn.Linear(32, 32), nn.Tanh()),
    "blocks.1.norm1": lambda: nn.Identity(),
    "blocks.1.norm2": lambda: nn.LayerNorm(32, bias=False),
    "blocks.0.norm1": lambda: nn.LayerNorm((17, 32)),
    "blocks.0.norm2": lambda: nn.LayerNorm(32, elementwise_affine=False, eps=0.1),
    "blocks.0.attn.q_norm": lambda: nn.LayerNorm(16),
    "blocks.0.attn.norm": lambda: nn.LayerNorm(32),
    "blocks.1": lambda: nn.Identity(),
    "blocks.0.ls1": lambda: timm.layers.LayerScale(32, 0.3),
    "norm": lambda: nn.Identity(),
    "fc_norm": lambda: nn.LayerNorm(32),
    "norm_pre": lambda: nn.LayerNorm(32),
    "head": lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 5)),
    "head_drop": lambda: nn.Identity(),
    "patch_embed.proj": lambda: nn.Conv2d(3, 32, 8, 8, bias=False),
    "patch_embed.norm": lambda: nn.LayerNorm(32),
    "patch_embed": lambda: nn.Sequential(nn.Conv2d(3, 32, 3, 8, 1), nn.Flatten(2), nn.LayerNorm(16), Transpose()),
}


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("place", REPLACEMENTS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_replaced_module(name, place, training):
    theirs, ours = logits_of_pair(name, lambda m: put(m, place, REPLACEMENTS[place]().train(training)), training)
    close(ours, theirs, what=place)


def same_block_twice(m: nn.Module) -> None:
    m.blocks[1] = m.blocks[0]


def tied_weights(m: nn.Module) -> None:
    m.blocks[1].mlp.fc1.weight = m.blocks[0].mlp.fc1.weight


def fewer_blocks(m: nn.Module) -> None:
    del m.blocks[1]


def no_blocks(m: nn.Module) -> None:
    m.blocks = nn.Sequential()


def own_forward(m: nn.Module) -> None:
    attn = m.blocks[1].attn
    real = attn.forward
    attn.forward = lambda x, **kwargs: real(x) * 2


def own_forward_of_a_linear(m: nn.Module) -> None:
    fc1 = m.blocks[1].mlp.fc1
    fc1.forward = lambda x: nn.functional.linear(x, fc1.weight) * 2


def own_features(m: nn.Module) -> None:
    real = m.forward_features
    m.forward_features = lambda x, **kwargs: real(x).flip(1)


def own_pool(m: nn.Module) -> None:
    m.pool = lambda x, pool_type=None: x[:, 1]


def layers_that_drop_in_evaluation(m: nn.Module) -> None:
    for module in m.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.4
            module.train()


def rates_changed_later(m: nn.Module) -> None:
    m.train()
    m.blocks[1].mlp.drop2.p = 0.5
    m.blocks[0].attn.proj_drop.p = 0.5


def frozen(m: nn.Module) -> None:
    m.blocks.requires_grad_(False)


def another_block_sequence(m: nn.Module) -> None:
    m.blocks = nn.Sequential(m.blocks[1], nn.Identity(), m.blocks[0])


def another_norm_at_the_end(m: nn.Module) -> None:
    m.norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


WHOLE = [
    same_block_twice, tied_weights, fewer_blocks, no_blocks, own_forward, own_forward_of_a_linear, own_features,
    own_pool, layers_that_drop_in_evaluation, rates_changed_later, frozen,
    another_block_sequence, another_norm_at_the_end,
]  # fmt: skip


@pytest.mark.parametrize("change", WHOLE, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", BACKENDS)
def test_other_changes(name, change):
    theirs, ours = logits_of_pair(name, change)
    close(ours, theirs)


@contextmanager
def exchanged(kind: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Another function in a class, given the one before it."""
    before = getattr(kind, name)
    setattr(kind, name, lambda self, *args, **kwargs: function(before, self, *args, **kwargs))
    try:
        yield
    finally:
        setattr(kind, name, before)


@pytest.mark.parametrize(
    "place",
    ["", "patch_embed", "patch_embed.proj", "blocks", "blocks.0", "blocks.0.attn", "blocks.0.mlp", "blocks.0.mlp.act",
     "blocks.0.norm1", "blocks.0.mlp.drop1", "blocks.0.mlp.fc1", "blocks.0.ls1"],
)  # fmt: skip
@pytest.mark.parametrize("name", BACKENDS)
def test_a_forward_put_into_a_class_is_called(name, place):
    """What token merging, quantisation in training and recorders of attention do."""
    seen = []
    for model in pair(name):
        with exchanged(
            type(model.get_submodule(place)), "forward", lambda before, *args, **kwargs: before(*args).flip(-1)
        ):
            seen.append(model(images()))
        with pytest.raises(AssertionError):
            close(model(images()), seen[-1])
    close(seen[1], seen[0])


@pytest.mark.parametrize("method", ["forward_features", "forward_head", "pool", "_pos_embed"])
@pytest.mark.parametrize("owner", ["class", "instance"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_method_put_into_the_model_is_called(name, owner, method):
    seen = []
    for model in pair(name):
        if owner == "class":
            with exchanged(type(model), method, lambda before, *args, **kwargs: before(*args).flip(1)):
                seen.append(model(images()))
        else:
            real = getattr(model, method)
            setattr(model, method, lambda *args, real=real, **kwargs: real(*args).flip(1))
            seen.append(model(images()))
    close(seen[1], seen[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_another_way_to_call_modules_is_taken(name):
    seen = []
    for model in pair(name):
        names: list[str] = []
        with exchanged(
            nn.Module,
            "__call__",
            lambda before, self, *a, names=names, **k: (names.append(type(self).__name__), before(self, *a, **k))[1],
        ):
            model(images())
        seen.append(sorted(names))
    assert len(seen[1]) == len(seen[0])


@pytest.mark.parametrize("fused", [True, False])
def test_the_scale_of_attention_is_timms(fused):
    def change(model: nn.Module) -> None:
        for block in model.blocks:
            block.attn.fused_attn = fused
            block.attn.scale = 1.5

    theirs, ours = logits_of_pair("reference", change)
    close(ours, theirs)


LINEARS = [
    "blocks.0.attn.qkv",
    "blocks.0.attn.proj",
    "blocks.1.mlp.fc1",
    "blocks.1.mlp.fc2",
    "head",
    "patch_embed.proj",
]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


REPARAMETERIZATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": lambda module: parametrizations.weight_norm(module),
    "spectral_norm": lambda module: parametrizations.spectral_norm(module),
    "orthogonal": lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
    "old weight_norm": lambda module: nn.utils.weight_norm(module),
    "old spectral_norm": lambda module: nn.utils.spectral_norm(module),
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "pruned for good": lambda module: prune.remove(prune.l1_unstructured(module, "weight", 0.5), "weight"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", REPARAMETERIZATIONS)
@pytest.mark.parametrize("place", LINEARS)
@pytest.mark.parametrize("name", BACKENDS)
def test_reparameterized_weights(name, place, how):
    def change(model: nn.Module) -> None:
        REPARAMETERIZATIONS[how](model.get_submodule(place))
        with torch.no_grad():  # so that weights which are made once and kept are stale
            for parameter in model.get_submodule(place).parameters():
                parameter.mul_(1.5)
        model.eval()

    theirs, ours = logits_of_pair(name, change)
    close(ours, theirs, what=place)


class Counted(nn.Module):
    looks = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.looks += 1
        return weight


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("model", "arch"),
    [
        (NAME, {}),
        (NAME, {"dynamic_img_size": True}),
        (NAME, {"reg_tokens": 2, "init_values": 0.1, "qk_norm": True}),
        (NAME, {"global_pool": "map", "class_token": False}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("eva02_tiny_patch14_224", {"embed_dim": 64}),
        ("vit_base_patch16_rope_reg1_gap_256", {"embed_dim": 64}),
        ("vit_small_patch16_dinov3", {"embed_dim": 64}),
    ],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_parametrizations_are_computed_no_oftener_than_in_timm(name, model, arch, training):
    """Spectral norm takes a step of its iteration at each look; what draws random numbers draws others."""

    def looks(model: nn.Module) -> dict[str, int]:
        counted = {}
        for path, module in list(model.named_modules()):
            for own, _ in list(module.named_parameters(recurse=False)):
                counted[f"{path}.{own}"] = Counted()
                parametrize.register_parametrization(module, own, counted[f"{path}.{own}"])
        for parametrization in counted.values():
            parametrization.looks = 0
        model.train(training)(images())
        return {path: parametrization.looks for path, parametrization in counted.items()}

    sizes = SMALL | arch
    theirs, ours = (
        looks(timm.create_model(model, **sizes)),
        looks(vit.create(model, backend=name, device="cpu", **sizes)),
    )
    assert theirs.keys() == ours.keys()
    assert {path for path in ours if ours[path] > theirs[path]} == set()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BACKENDS)
def test_dynamic_quantization_finds_every_linear_layer(name):
    theirs, ours = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}) for m in pair(name))
    quantized = [path for path, m in ours.named_modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(quantized) == 4 * 2 + 1
    # 8-bit inputs: where two roundings fall apart, one step of 1/255 of the range, at most 4 one behind another.
    assert (ours(images()) - theirs(images())).abs().max() < 4 / 255 * theirs(images()).abs().max()


# ---- adapters ----


def adapted(model: nn.Module, config: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["qkv", "proj", "fc1", "fc2", "head", "patch_embed.proj"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", BACKENDS)
def test_low_rank_adapters(name, dora, target):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[target], init_lora_weights=False, use_dora=dora, r=4)
    theirs, ours = (adapted(m, config) for m in pair(name))
    with torch.no_grad():
        expected = theirs(images())
    got = ours(images())
    close(got.detach(), expected)
    got.square().sum().backward()
    gradients = [p.grad for n, p in ours.named_parameters() if "lora_" in n]
    assert gradients
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    with ours.disable_adapter():
        off = ours(images())
    assert (off - got).abs().max() > 1e-3
    merged = ours.merge_and_unload()
    close(merged(images()), got)
    assert type(merged) is vit.VisionTransformer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BACKENDS)
def test_scaled_activations(name):
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=False)
    theirs, ours = (adapted(m, config) for m in pair(name))
    close(ours(images()), theirs(images()))
    close(ours.merge_and_unload()(images()), theirs(images()))


# ---- other ways to run it ----


class Own(vit.VisionTransformer):
    def forward_features(self, images):
        return super().forward_features(images) * 2


@pytest.mark.parametrize("name", BACKENDS)
def test_a_subclass_is_asked(name):
    model = Own(**SMALL, backend=name)
    draw.normal_(model.head.weight)
    x = images()
    assert torch.equal(model(x), model.forward_head(vit.VisionTransformer.forward_features(model, x) * 2))


@pytest.mark.parametrize("name", BACKENDS)
def test_other_parameters(name):
    theirs, ours = pair(name)
    parameters = {key: value * 1.1 for key, value in ours.named_parameters()}
    got = torch.func.functional_call(ours, parameters, (images(),))
    close(got, torch.func.functional_call(theirs, parameters, (images(),)))
    assert (got - ours(images())).abs().max() > 1e-3


@pytest.mark.parametrize("name", BACKENDS)
def test_copies_follow_their_own_modules(name):
    theirs, ours = pair(name)
    hooked = copy.deepcopy(ours)
    hooked.blocks[1].mlp.register_forward_hook(lambda module, args, y: 0 * y)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.deepcopy(hooked)):
        copied.blocks[0].mlp = nn.Identity()
    close(ours(images()), theirs(images()))
    theirs.blocks[1].mlp.register_forward_hook(lambda module, args, y: 0 * y)
    close(hooked(images()), theirs(images()))


def test_compiled_with_a_hook_it_is_what_it_is_without():
    for name in BACKENDS:
        model = pair(name)[1]
        model.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, y: y * 2)
        expected = model(images())
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="eager")(images()), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", BACKENDS)
def test_features_then_head_is_forward(name):
    for arch in ({}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}):
        model = pair(name, **arch)[1]
        close(model.forward_head(model.forward_features(images())), model(images()))


# ---- what timm's tools read ----


def test_timm_reads_the_models_own_preprocessing():
    def read(model: nn.Module) -> dict[str, Any]:
        return timm.data.resolve_model_data_config(model)

    for name in ("deit_tiny_patch16_224", "vit_tiny_patch16_384"):
        assert read(vit.create(name, depth=1)) == read(timm.create_model(name, depth=1))
    digits = read(vit.create("vit_digits"))
    assert (digits["input_size"], digits["mean"], digits["interpolation"]) == ((1, 8, 8), (0.5,), "bilinear")
    model = vit.create(NAME, **SMALL)
    model.preprocess = Preprocess((48, 32), mean=(0.1, 0.2, 0.3), std=0.4, crop_pct=0.8)
    config = read(model)
    assert (config["input_size"], config["mean"], config["std"]) == ((3, 48, 32), (0.1, 0.2, 0.3), (0.4,) * 3)
    assert config["crop_pct"] == 0.8
    assert model.default_cfg == model.pretrained_cfg


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_a_model_made_without_values(name):
    theirs, _ = pair()
    with torch.device("meta"):
        model = vit.create(NAME, backend=name, **SMALL)
        loaded = vit.create(NAME, backend=name, weights=theirs.state_dict(), **SMALL)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(theirs.state_dict(), assign=True)
    for one in (model, loaded):
        close(one.eval()(images()).cpu(), theirs(images()))


def keywords(model: nn.Module, **options: Any) -> list[Any]:
    """The names of the keywords that the attention of each block is given, in order, and their plain values."""
    seen: list[Any] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Tensor) -> None:
        seen.append((len(args), {k: v.shape if isinstance(v, Tensor) else v for k, v in kwargs.items()}))

    for block in model.blocks:
        block.attn.register_forward_hook(look, with_kwargs=True)
    model(images(), **options)
    return seen


@pytest.mark.parametrize(("name", "options"), [*((n, {}) for n in BACKENDS), ("reference", {"is_causal": True})])
def test_hooks_of_attention_see_the_keywords_of_timm(name, options):
    theirs, ours = pair(name)
    want = keywords(theirs, **options)
    assert len(want[0][1]) == 2
    assert keywords(ours, **options) == want


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("norm", [False, True], ids=["pre-norm", "post-norm"])
def test_hooks_of_rotary_attention_see_the_keywords_of_timm(name, norm):
    arch = SMALL | {"embed_dim": 48, "use_post_norm": norm}
    theirs = timm.create_model("eva02_tiny_patch14_224", **arch)
    ours = vit.create("eva02_tiny_patch14_224", backend=name, device="cpu", **arch)
    want = keywords(theirs)
    assert len(want[0][1]) == 3
    assert keywords(ours) == want
