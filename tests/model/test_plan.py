"""A plan says what a forward calls: every op with its sizes and options, whatever the model, the mode and the path."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import draw
import named
import pytest
import torch
import vit
from conftest import USABLE
from torch import nn
from vit.backends import BackendError, Spec, get
from vit.model.configs import CONFIGS
from vit.model.planned import CallsOps
from vit.ops import OPS
from vit.ops.bound import NativeOp
from vit.plan import Unplanned, make_plan

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 3}

Call = tuple[str, tuple[tuple[str, tuple[Any, ...]], ...], tuple[tuple[str, Any], ...]]


class Recorder(NativeOp):
    """A planned op that writes down what it is asked."""

    def __init__(self, real: Any, calls: set[Call]) -> None:
        self.real, self.calls = real, calls
        # The model looks at it to see what the kernels take. With one, the reference is treated like a native backend.
        self.record = getattr(real, "record", SimpleNamespace(device_types=("cpu",), dtypes=(torch.float32,)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.add(describe(self.real.op.name, *args, **kwargs))
        return self.real(*args, **kwargs)


def describe(op: str, *args: Any, **kwargs: Any) -> Call:
    """The call as specs() writes it: "*" for the batch, tensors that decide, options that are not the default."""
    given = dict(zip(PARAMETERS[op], args, strict=False)) | kwargs
    if op == "attention":
        q = given["q"]
        packed = (*q.shape[:2], *q.shape[3:])
        shapes = {n: packed if given.get("k") is None else tuple(given[n].shape) for n in ("q", "k", "v")}
        options = {"queries": given.get("queries")}
    elif op == "linear":
        shapes = {name: tuple(given[name].shape) for name in ("x", "weight")}
        options = {"activation": given.get("activation")}
    elif op in ("layer_norm", "rms_norm"):
        shapes, options = {name: tuple(given[name].shape) for name in ("x", "weight")}, {}
    elif op in ("rotary", "swiglu"):
        shapes, options = {"x": tuple(given["x"].shape)}, {"pairing": given.get("pairing")}
    else:
        shapes, options = {"x": tuple(given["x"].shape)}, {"approximate": given.get("approximate", "none")}
    first = next(iter(shapes))
    shapes = {n: ("*", *s[1:]) if n == first or op == "attention" else s for n, s in shapes.items()}
    return op, tuple(shapes.items()), tuple((k, v) for k, v in options.items() if v is not None)


PARAMETERS = {
    "linear": ("x", "weight", "bias", "activation", "residual", "scale"),
    "rms_norm": ("x", "weight", "eps"),
    "layer_norm": ("x", "weight", "bias", "eps"),
    "gelu": ("x", "approximate"),
    "attention": ("q", "k", "v", "scale", "queries"),
    "rotary": ("x", "table", "prefix", "pairing"),
    "swiglu": ("x", "gate"),
}


def planned(model: nn.Module) -> set[Call]:
    def call(spec: Spec) -> Call:
        options = {k: v for k, v in spec.options.items() if k != "dropout"}  # dropped probabilities are PyTorch's
        return spec.op, tuple(spec.shapes.items()), tuple(options.items())

    return {call(spec) for spec in model._plan.specs}


def called(model: nn.Module, run: Callable[[nn.Module], Any]) -> set[Call]:
    calls: set[Call] = set()
    ops = copy.copy(model.ops)
    for name in OPS:
        if not isinstance(getattr(ops, name), Unplanned):
            setattr(ops, name, Recorder(getattr(ops, name), calls))
    for module in model.modules():
        if isinstance(module, CallsOps):
            module.ops = ops
    run(model)
    model.bind(model._plan)
    return calls


def forward_and_backward(model: nn.Module) -> None:
    model(images(model)).sum().backward()


def images(model: nn.Module) -> torch.Tensor:
    return draw.randn(2, model.patch_embed.in_chans, *model.patch_embed.img_size)


def evaluation(model: nn.Module) -> None:
    with torch.inference_mode():
        model.eval()(images(model))


def hooked(model: nn.Module) -> None:
    handles = [m.register_forward_hook(lambda *args: None) for m in model.modules()]
    forward_and_backward(model)
    for handle in handles:
        handle.remove()


def features(model: nn.Module) -> None:
    model.forward_head(model.forward_features(images(model)), pre_logits=True)


def intermediates(model: nn.Module) -> None:
    model.forward_intermediates(images(model), norm=model.global_pool != "avg")
    model.get_intermediate_layers(images(model), reshape=True)


def checkpointed(model: nn.Module) -> None:
    model.set_grad_checkpointing()
    forward_and_backward(model)


RUNS = (forward_and_backward, evaluation, hooked, features, intermediates, checkpointed)

ARCHS = [
    {"qk_norm": True, "norm_layer": "rmsnorm", "init_values": 0.1, "act_layer": "quick_gelu"},
    {"mlp_layer": "swiglu", "act_layer": "silu", "scale_mlp_norm": True, "global_pool": "map", "reg_tokens": 2},
    {"mlp_layer": "swiglu_packed", "scale_attn_norm": True, "pre_norm": True, "no_embed_class": True},
    {"act_layer": "silu", "embed_norm_layer": "rmsnorm", "dynamic_img_size": True, "global_pool": "avgmax"},
    {},
    {"global_pool": "avg"},
    {"global_pool": "avg", "class_token": False},
    {"global_pool": "", "act_layer": "gelu_tanh"},
    {"global_pool": "", "decoder": (12, 8)},
    {"global_pool": "", "decoder": (8,), "norm_layer": "rmsnorm", "act_layer": "silu"},
    {"num_classes": 0, "pos_embed": "sincos2d"},
    {"proj_drop_rate": 0.3, "drop_path_rate": 0.3, "pos_drop_rate": 0.3, "drop_rate": 0.3},
    {"attn_drop_rate": 0.3},
    {"img_size": (30, 41), "dynamic_pad": True, "patch_embed": "linear", "pos_embed": "none"},
    {"img_size": (16, 48), "in_chans": 1, "mlp_ratio": 1.5, "qkv_bias": False},
]


def check(model: nn.Module) -> None:
    seen: set[Call] = set()
    for run in RUNS:
        calls = called(model, run)
        assert not calls - planned(model), run.__name__
        seen |= calls
        model.train()
        model.set_grad_checkpointing(False)
    assert not planned(model) - seen  # evaluation takes every short cut


@pytest.mark.parametrize("arch", ARCHS, ids=str)
@pytest.mark.parametrize("name", ["reference", *USABLE])
def test_what_a_forward_calls_is_what_was_planned(name, arch):
    if "attn_drop_rate" in arch and name != "reference":
        name = "auto"
    check(vit.create("vit_tiny_patch16_224", backend=name, device="cpu", **(SMALL | arch)))


@pytest.mark.parametrize("name", named.one_of_each_kind())
def test_every_named_model_calls_what_was_planned(name):
    arch = CONFIGS[name].arch
    narrow = {"embed_dim": 8 * arch["num_heads"], "img_size": 2 * arch["patch_size"]}
    check(vit.create(name, backend="reference", depth=1, **narrow))


def test_the_recorder_finds_what_was_not_planned():
    model = vit.create("vit_tiny_patch16_224", backend="reference", **SMALL)
    model.blocks[1].mlp.fc1 = nn.Linear(48, 7)
    model.blocks[1].mlp.fc2 = nn.Linear(7, 48)
    assert called(model, forward_and_backward) - planned(model)


@pytest.mark.parametrize("name", ["reference", "auto", *USABLE])
def test_what_was_not_planned_is_an_error(name):
    spec = Spec("linear", torch.float32, {"x": ("*", 4), "weight": (3, 4)})
    plan = make_plan(name, [spec], "my_model")
    assert plan.ops.linear(torch.ones(2, 4), torch.ones(3, 4)).sum() == 24
    for ops in (plan.ops, pickle.loads(pickle.dumps(plan.ops)), copy.deepcopy(plan.ops)):
        for op in set(OPS) - {"linear"}:
            with pytest.raises(
                BackendError, match=rf"'{op}' was called but not planned for my_model\n  planned +linear"
            ):
                getattr(ops, op)(torch.ones(2, 2))


@pytest.mark.parametrize("name", USABLE)
def test_movement_follows_the_backend_asked_for(name):
    spec = Spec("gelu", torch.float32, {"x": ("*", 4)})
    assert make_plan(name, [spec]).ops.movement.backend == (name if get(name).moves else "auto")
    assert make_plan("reference", [spec]).ops.movement.backend == "auto"
