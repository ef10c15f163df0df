"""Whole models on native backends: as exact as PyTorch in the same dtype, and nothing but our kernels inside."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import draw
import pytest
import torch
import torch.nn.functional as F
import vit
from conftest import NATIVE, USABLE
from rounding import close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vit.backends import BackendError
from vit.model import VisionTransformer
from vit.parity.tolerance import compare

#: name, arguments: the tokens and widths of ViT-Ti/16, small ones, and odd ones with every other option.
MODELS = {
    "tiny": ("vit_tiny_patch16_224", {"depth": 2}),
    "digits": ("vit_digits", {}),
    "odd": (
        "vit_tiny_patch16_224",
        {"img_size": (30, 42), "patch_size": (10, 6), "embed_dim": 72, "depth": 3, "num_heads": 4, "mlp_ratio": 1.5,
         "num_classes": 7, "act_layer": "gelu_tanh", "global_pool": "avg", "pos_embed": "sincos2d", "qkv_bias": False},
    ),
}  # fmt: skip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}


def build(which: str) -> VisionTransformer:
    """A float64 reference model with every parameter drawn, so that none is at a special value."""
    name, arch = MODELS[which]
    model = vit.create(name, backend="reference", dtype="float64", **arch)
    return draw.fill(model, 0.05)


def moved(model: VisionTransformer, backend: str, device: Any, dtype: torch.dtype) -> VisionTransformer:
    """The same weights, rounded to `dtype`, on another backend."""
    copied = copy.deepcopy(model)
    copied.backend = "auto"  # so that the move itself may pass through any plan
    copied.to(device, dtype)
    copied.backend = backend
    copied.replan()
    return copied


def batch(model: VisionTransformer, count: int = 2) -> tuple[Tensor, Tensor]:
    size = (count, model.patch_embed.in_chans, *model.patch_embed.img_size)
    return draw.randn(size).to(torch.bfloat16), draw.randint(0, model.num_classes, (count,))


def step(model: VisionTransformer, x: Tensor, y: Tensor, autocast: bool) -> dict[str, Tensor]:
    """Logits, and the gradients of the images and of every parameter."""
    model.zero_grad()
    x = x.to(model.device, model.dtype).requires_grad_()
    mode = torch.autocast(model.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    with mode:
        logits = model(x)
    F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, y.to(model.device)).backward()
    return {"logits": logits.detach(), "images": x.grad} | {name: p.grad for name, p in model.named_parameters()}


def hold(name: str, got: Tensor, truth: Tensor, baseline: Tensor, compute: torch.dtype) -> None:
    verdict = compare(name, got, truth, baseline, truth.abs(), dtype=got.dtype, compute_dtype=compute)
    assert verdict.ok, verdict.text


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", MODELS)
def test_logits_and_every_gradient(backend, device, which, dtype):
    exact = build(which)
    rounded = moved(exact, "reference", "cpu", DTYPES[dtype])
    exact.load_state_dict(rounded.state_dict())  # all three have the same numbers
    native, torch_ = moved(exact, backend, device, DTYPES[dtype]), moved(exact, "reference", device, DTYPES[dtype])
    assert set(native.plan.values()) == {backend}
    # The worst of some 10^4 elements is a matter of luck on both sides: four batches make the two comparable.
    batches = [batch(exact) for _ in range(4)]
    models = exact, torch_, native
    steps = [[step(m, x, y, dtype == "autocast" and m is not exact) for x, y in batches] for m in models]
    truth, baseline, got = (
        {name: torch.stack([s[name] for s in of_model]) for name in of_model[0]} for of_model in steps
    )
    for name in truth:
        assert got[name].dtype == baseline[name].dtype, name
        hold(name, got[name], truth[name], baseline[name], DTYPES[dtype])


@pytest.mark.parametrize("which", ["digits", "odd"])
def test_ten_training_steps(backend, device, which):
    exact = build(which)
    models = [exact, moved(exact, "reference", device, torch.float32), moved(exact, backend, device, torch.float32)]
    x, y = batch(exact, 16)
    y %= 3  # of few classes: how often each comes is learnt in ten steps, which image is which is not
    losses = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        images, labels = x.to(model.device, model.dtype), y.to(model.device)
        history = []
        for _ in range(10):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        losses.append(torch.stack(history))
    truth, baseline, got = losses
    assert truth[-1] < 0.9 * truth[0]  # the steps did something: a model that stays where it is proves nothing
    hold("losses", got, truth, baseline, torch.float32)
    for (name, exact_), torch_, native in zip(
        models[0].named_parameters(), models[1].parameters(), models[2].parameters(), strict=True
    ):
        hold(name, native, exact_.detach(), torch_, torch.float32)


#: What a native model must not ask of PyTorch: the arithmetic that the ops stand for.
FORBIDDEN = (
    "mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "dot", "mv", "addmv", "einsum", "convolution",
    "convolution_backward", "mkldnn_linear", "mkldnn_convolution", "softmax", "_softmax", "_softmax_backward_data",
    "layer_norm", "native_layer_norm", "native_layer_norm_backward", "gelu", "gelu_backward",
)  # fmt: skip


class Watch(TorchDispatchMode):
    """Notes the name of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def forbidden(seen: set[str]) -> list[str]:
    return sorted(n for n in seen if n.startswith("aten::") and (n[6:] in FORBIDDEN or "attention" in n))


@pytest.mark.parametrize("which", MODELS)
def test_only_our_kernels_compute(backend, device, which):
    exact = build(which)
    x, y = batch(exact)
    with Watch() as watch:
        step(moved(exact, backend, device, torch.float32), x, y, autocast=False)
    assert not forbidden(watch.seen)
    ours = {name.split("::")[1] for name in watch.seen if name.startswith(f"vit_{backend}::")}
    assert ours == {f"{op}_{direction}" for op in ("linear", "layer_norm", "attention") for direction in ("fwd", "bwd")}


def test_the_watch_sees_what_it_forbids():
    exact = build("digits")
    with Watch() as watch:
        step(exact, *batch(exact), autocast=False)
    assert len(forbidden(watch.seen)) >= 5


def test_equal_runs_are_bit_identical(backend, device):
    exact = build("tiny")
    x, y = batch(exact)
    model = moved(exact, backend, device, torch.float32)
    first, second = step(model, x, y, False), step(model, x, y, False)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_logits_do_not_depend_on_the_batch(backend, device):
    model = moved(build("tiny"), backend, device, torch.float32).eval()
    x = batch(model, 5)[0].to(device, torch.float32)
    with torch.inference_mode():
        whole = model(x)
        for i in range(5):
            assert torch.equal(model(x[i : i + 1])[0], whole[i]), i
        assert torch.equal(model(x.flip(0)).flip(0), whole)


def test_inference_equals_training_forward(backend, device):
    model = moved(build("tiny"), backend, device, torch.float32)
    x = batch(model)[0].to(device, torch.float32)
    with torch.inference_mode():
        fused = model(x)
    assert torch.equal(model(x).detach(), fused)


@pytest.mark.parametrize("which", ["digits", "odd"])
def test_compiles_as_one_graph(backend, device, which):
    model = moved(build(which), backend, device, torch.float32)
    x = batch(model)[0].to(device, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), model(x)
    close(got, expected)
    got.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected.square().sum().backward()
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        close(grad, parameter.grad)
    torch._dynamo.reset()


def test_attention_dropout_is_a_reason(backend, device):
    with pytest.raises(BackendError, match=r"attention dropout 0\.1 is not 0"):
        vit.create("vit_digits", backend=backend, device=device, attn_drop_rate=0.1)
    auto = vit.create("vit_digits", device=device, attn_drop_rate=0.1)
    assert auto.plan["attention"] == "reference"
    assert auto.plan["linear"] != "reference"
    assert "attention dropout 0.1" in auto.explain()
    only_forward = vit.create("vit_digits", backend=backend, device=device, attn_drop_rate=0.1, training=False)
    assert only_forward.plan["attention"] == backend
    with pytest.raises(BackendError, match="attention dropout"):
        only_forward.train()
    assert not only_forward.training
    assert only_forward.plan["attention"] == backend


def test_a_refused_dtype_leaves_the_model_whole(backend, device):
    model = vit.create("vit_digits", backend=backend, device=device).eval()
    x = batch(model)[0].to(device, torch.float32)
    before = model(x)
    refused = torch.float8_e4m3fn if torch.float16 in NATIVE[backend].dtypes else torch.float16
    with pytest.raises(BackendError, match=str(refused).removeprefix("torch.")):
        model.to(refused)
    assert model.dtype == torch.float32
    assert torch.equal(model(x), before)
    with pytest.raises(BackendError, match=f"backend '{backend}' cannot run .* for vit_digits"):
        model.to("meta")
    assert torch.equal(model(x), before)


def test_auto_follows_dtype_and_back(backend, device):
    model = vit.create("vit_digits", device=device)
    if backend != "cpu":
        pytest.skip("auto prefers the cpu backend, which refuses float16")
    assert set(model.plan.values()) == {backend}
    assert set(model.half().plan.values()) == {"sycl" if "sycl" in USABLE else "reference"}
    assert set(model.float().plan.values()) == {backend}
    assert set(copy.deepcopy(model).plan.values()) == {backend}
