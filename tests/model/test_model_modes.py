"""Modes of the caller's that look at what a model asks of PyTorch see what they would see in timm."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import draw
import pytest
import timm
import torch
import torch.nn.functional as F
import vit
from PIL import Image
from rounding import close
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from vit.optim import blockwise

NAME = "vit_tiny_patch16_224"
ARCH: dict[str, Any] = {
    **{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3},
}
LAYERS = (F.linear, F.layer_norm, F.gelu, F.scaled_dot_product_attention)


class Seen(TorchFunctionMode):
    """Counts the calls of layers' functions, and lets one of them give zeros."""

    def __init__(self, nothing: Any = None) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.nothing = nothing

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func in LAYERS:
            self.calls[func.__name__] += 1
        return y * 0 if func is self.nothing else y


@pytest.fixture
def pair(which):
    theirs = timm.create_model(NAME, **ARCH).eval()
    state = {key: draw.randn(*value.shape) * 0.2 for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours = vit.create(NAME, backend=which, weights=state, **ARCH).eval()
    return theirs, ours, draw.randn(2, 3, 32, 32)


@pytest.mark.parametrize("which", ["reference", "cpu"])
@pytest.mark.parametrize("nothing", [None, *LAYERS])
def test_a_function_mode_sees_and_does_what_it_would_in_timm(pair, nothing):
    theirs, ours, x = pair
    with torch.no_grad():
        with Seen(nothing) as wanted:
            y = theirs(x)
        with Seen(nothing) as seen:
            close(ours(x), y)
    assert seen.calls == wanted.calls


@pytest.mark.parametrize("which", ["cpu"])
def test_the_plan_stays_strict_below_two_modes(pair):
    """The inner mode's calls reach the outer one, the kernels stay ours, and the modes are in order afterwards."""
    _, ours, x = pair
    with Seen() as outer, torch.device("cpu"), Seen() as inner, torch.profiler.profile() as profile:
        ours(x).sum().backward()
        stack = torch.overrides._get_current_function_mode_stack()
    assert stack[0] is outer
    assert stack[-1] is inner
    assert outer.calls == inner.calls
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::linear", "aten::addmm", "aten::native_layer_norm", "aten::gelu", "aten::convolution"}


@pytest.mark.parametrize("which", ["cpu"])
def test_flops_are_counted_as_in_timm(pair):
    theirs, ours, x = pair
    for model in (theirs, ours):  # every token, or ours would compute the last block's class token alone
        model.blocks[-1].register_forward_hook(lambda *_: None)
    counts = []
    for model in (theirs, ours):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(x)
        with FlopCounterMode(display=False) as both:
            model(x).sum().backward()
        counts.append((forward.get_total_flops(), both.get_total_flops()))
    # timm's attention on a CPU is not in PyTorch's table of formulas in every version, ours is.
    assert counts[1][0] == pytest.approx(counts[0][0], rel=0.08)
    assert counts[1][1] == pytest.approx(counts[0][1], rel=0.15)
    assert counts[1][1] > 2.5 * counts[1][0]


@pytest.mark.parametrize("which", ["cpu"])
def test_a_trace_of_torch_fx_leaves_the_masks_out(pair):
    _, ours, x = pair
    close(torch.fx.symbolic_trace(ours)(x), ours(x))


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits and gradients of a step, and what 8-bit states made of a parameter."""
    y = model.train()(x)
    y.square().sum().backward()
    vit.optim.AdamW(model.parameters(), lr=1e-3, state="8bit").step()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None), model.pos_embed.detach()]


USES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "logits": lambda model, x: model(x),
    "a training step": trained,
    "features": lambda model, x: model.forward_intermediates(x)[1],
    "given weights": lambda model, x: vit.create(NAME, backend=model.backend, weights=model.state_dict(), **ARCH)(x),
    "an image": lambda model, x: model.preprocess(Image.new("RGB", (40, 50), (10, 200, 30))),
    "int8": lambda model, x: vit.quantize(model, "int8", calibrate=x)(x),
    "engine": lambda model, x: vit.Engine(model)(x),
    "engine bfloat16": lambda model, x: vit.Engine(model, dtype="bfloat16")(x),
    "engine int8": lambda model, x: vit.Engine(model, dtype="int8", calibrate=x)(x),
}


@pytest.mark.parametrize("which", ["reference", "cpu"])
@pytest.mark.parametrize("use", USES)
def test_another_default_device_changes_nothing(pair, use):
    """torch.set_default_device("cuda") is a habit; what belongs to tensors on the CPU stays there."""
    _, ours, x = pair
    expected = USES[use](copy.deepcopy(ours), x)
    with torch.device("meta"):
        got = USES[use](copy.deepcopy(ours), x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_another_default_device_changes_no_code_of_8_bit_states():
    expected = blockwise.code(True)
    blockwise.code.cache_clear()
    with torch.device("meta"):
        got = blockwise.code(True)
    assert torch.equal(got, expected)
