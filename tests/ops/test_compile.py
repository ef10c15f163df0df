"""The registered ops: opcheck, torch.compile without graph breaks, and what a dispatch mode sees."""

from __future__ import annotations

import copy
import io
from typing import Any

import draw
import pytest
import torch
import vit
from rounding import close
from test_ops import call, small
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vit.ops import OPS, bind

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch.compile's own

#: What a native model must not leave to PyTorch.
HEAVY = (
    "mm",
    "matmul",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "conv",
    "softmax",
    "layer_norm",
    "gelu",
    "attention",
    "einsum",
)


class Recorder(TorchDispatchMode):
    """Every op that reaches the dispatcher, and the arguments of those of our namespaces."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.ours: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.names.append(name)
        if name.startswith("vit_"):
            self.ours[name] = (func, args)
        return func(*args, **(kwargs or {}))

    def heavy(self) -> list[str]:
        aten = [name.removeprefix("aten::") for name in self.names if name.startswith("aten::")]
        return sorted(
            {
                name
                for name in aten
                if any(word in name.split("_") or word == name for word in HEAVY)
                or any(word in name for word in ("conv", "softmax", "layer_norm", "gelu", "attention"))
            }
        )


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(backend, device, op, dtype):
    tensors, options = small(op, dtype, device, grad=True)
    with Recorder() as seen:
        y = call(op, backend, tensors, options)
        torch.autograd.grad(y, list(tensors.values()), draw.randn_like(y))
    assert set(seen.ours) == {f"vit_{backend}::{op}_fwd", f"vit_{backend}::{op}_bwd"}
    for func, args in seen.ours.values():
        plain = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(func, plain)


@pytest.mark.parametrize("op", OPS)
def test_the_fake_function_tells_shape_dtype_and_layout(backend, device, op):
    """opcheck compares with the kernel's result; here with strides, which compiled code relies on."""
    tensors, options = small(op, device=device)
    tensors = {
        name: x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x for name, x in tensors.items()
    }
    bound = bind(op, backend)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = call(op, backend, {name: mode.from_tensor(x) for name, x in tensors.items()}, options)
    real = bound(**tensors, **options)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("op", OPS)
def test_compile_forward_and_backward(backend, device, op):
    tensors, options = small(op, device=device, grad=True)

    def f(**tensors: Tensor) -> Tensor:
        return call(op, backend, tensors, options)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    y, eager = compiled(**tensors), f(**tensors)
    assert y.equal(eager)
    dy = draw.randn_like(y)
    got = torch.autograd.grad(y, list(tensors.values()), dy)
    want = torch.autograd.grad(eager, list(tensors.values()), dy)
    for name, a, b in zip(tensors, got, want, strict=True):
        assert a.equal(b), name
    with torch.no_grad():
        assert compiled(**tensors).equal(eager)


def test_compile_once_for_every_number_of_tokens(backend, device):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=counting, dynamic=True)
    def block(x: Tensor, w: Tensor, norm: Tensor) -> Tensor:
        h = vit.ops.layer_norm(x, norm, None, backend=backend)
        qkv = vit.ops.linear(h, w, backend=backend).unflatten(-1, (3, 2, 8))
        return vit.ops.gelu(vit.ops.attention(qkv, backend=backend), backend=backend).flatten(2)

    w, norm = draw.randn(48, 16, device=device, requires_grad=True), torch.ones(16, device=device)
    for n in (127, 193, 5):
        x = draw.randn(2, n, 16, device=device)
        y = block(x, w, norm)
        assert y.shape == (2, n, 16)
        y.sum().backward()
    assert len(graphs) == 1


@pytest.mark.slow
def test_inductor_runs_a_block_forward_and_backward(backend, device):
    def block(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        q, k, values = vit.ops.linear(x, w, backend=backend).unflatten(-1, (3, 2, 8)).unbind(2)
        h = x + vit.ops.attention(q, k, values, backend=backend).flatten(2) * 0.5
        return vit.ops.linear(h, v, activation="gelu", residual=h, backend=backend)

    tensors = [draw.randn(s, device=device, requires_grad=True) for s in ((2, 9, 16), (48, 16), (16, 16))]
    y, eager = torch.compile(block, fullgraph=True)(*tensors), block(*tensors)
    close(y, eager)
    dy = draw.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(eager, tensors, dy), strict=True):
        close(a, b)


@pytest.mark.parametrize("op", ["matmul", "linear", "attention"])
def test_autocast_compiled_is_autocast_eager(backend, device, op):
    tensors, options = small(op, device=device, grad=True)

    def f(**tensors: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return call(op, backend, tensors, options)

    y, eager = torch.compile(f, fullgraph=True, backend="aot_eager")(**tensors), f(**tensors)
    assert y.dtype == eager.dtype
    assert y.equal(eager)
    dy = draw.randn_like(y)
    got = torch.autograd.grad(y, list(tensors.values()), dy)
    want = torch.autograd.grad(eager, list(tensors.values()), dy)
    assert all(g.dtype == torch.float32 for g in got)
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_native_model_leaves_nothing_heavy_to_pytorch(backend, device, kind):
    model = vit.create("vit_digits", backend=backend, device=device, patch_embed=kind)
    images = draw.randn(2, 1, *model.patch_embed.img_size, device=device)
    with Recorder() as seen:
        model(images).sum().backward()
        model.eval()
        with torch.no_grad():
            model(images)
    assert any(name.startswith(f"vit_{backend}::linear_bwd") for name in seen.names)
    assert seen.heavy() == []


def test_the_recorder_sees_what_the_reference_does():
    """The test above cannot fail for want of a sharp eye: the reference is full of what it forbids."""
    x, w = draw.randn(2, 5, 2, 8, requires_grad=True), draw.randn(8, 8)
    with Recorder() as seen:
        y = vit.ops.attention(x, x, x, backend="reference")
        y = vit.ops.gelu(
            vit.ops.linear(vit.ops.layer_norm(y, backend="reference"), w, backend="reference"), backend="reference"
        )
        (y @ w).sum().backward()
        torch.nn.functional.conv2d(draw.randn(1, 1, 4, 4), draw.randn(1, 1, 2, 2)).softmax(-1)
    text = " ".join(seen.heavy())
    for word in ("mm", "convolution", "softmax", "layer_norm", "gelu", "attention"):
        assert word in text, f"{word} not in {text}"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
class TestTrace:
    """What is traced for other programs has the bits of the reference and none of our ops, whatever the backend; it can
    be saved, frozen and trained, in whatever mode it was made."""

    MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)

    @pytest.fixture
    def model(self, backend, device):
        return self.made(backend, device)

    @pytest.fixture
    def reference(self, model, device):
        found = self.made("reference", device)
        found.load_state_dict(model.state_dict())
        return found

    @staticmethod
    def made(backend, device):
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
        return vit.create("vit_tiny_patch16_224", backend=backend, device=device, **sizes)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("inside", [False, True])
    def test_what_scripting_needs_instead_is_said(self, model, inside):
        given = torch.nn.Sequential(model, torch.nn.ReLU()) if inside else model
        with pytest.raises(NotImplementedError, match=r"vit_tiny.*torch\.jit\.trace\(model, images\)"):
            torch.jit.script(given)

    @pytest.mark.parametrize("train", [False, True])
    @pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
    def test_a_model(self, model, reference, device, mode, train):
        model.train(train), reference.train(train)
        one, four = (draw.randn(n, 3, 32, 32, device=device) for n in (1, 4))
        with mode():
            traced = torch.jit.trace(model, one)
        assert "vit_" not in str(traced.inlined_graph)
        assert traced(one).equal(reference(one))
        assert traced(four).equal(reference(four))
        self.same_gradients(traced, reference, four)

    def test_saved_frozen_and_copied(self, model, reference, device):
        images = draw.randn(2, 3, 32, 32, device=device)
        traced = torch.jit.trace(model.eval(), images)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        want = reference.eval()(images)
        for other in (loaded, torch.jit.freeze(loaded), torch.jit.freeze(traced), copy.deepcopy(traced)):
            assert other(images).equal(want)
        self.same_gradients(loaded, reference, images)

    @pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
    @pytest.mark.parametrize("op", OPS)
    def test_an_op(self, backend, device, op, mode):
        tensors, options = small(op, device=device, grad=True)

        def f(*given: Tensor, backend: str = backend) -> Tensor:
            return call(op, backend, dict(zip(tensors, given, strict=True)), options)

        with mode():
            traced = torch.jit.trace(f, tuple(x.detach() for x in tensors.values()))
        assert "vit_" not in str(traced.graph)
        y, plain = traced(*tensors.values()), f(*tensors.values(), backend="reference")
        assert y.equal(plain)
        got, want = (torch.autograd.grad(z.square().sum(), list(tensors.values())) for z in (y, plain))
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))

    @pytest.mark.skipif(not hasattr(torch.compiler, "_is_exporting_flag"), reason="torch says so from 2.7 on")
    @pytest.mark.parametrize("strict", [False, True])
    def test_an_exported_program(self, model, reference, device, strict):
        images = draw.randn(2, 3, 32, 32, device=device)
        program = torch.export.export(model.eval(), (images,), strict=strict)
        assert "vit_" not in str(program.graph)
        close(program.module()(images), reference.eval()(images))

    @pytest.mark.filterwarnings("ignore")  # OpenVINO's own
    @pytest.mark.parametrize("dynamo", [False, True])
    def test_openvino_converts_a_model(self, model, device, dynamo):
        openvino = pytest.importorskip("openvino")
        if device.type != "cpu":
            pytest.skip("OpenVINO traces on the CPU")
        images = draw.randn(2, 3, 32, 32)
        converted = openvino.compile_model(openvino.convert_model(model.eval(), example_input=images, dynamo=dynamo))
        close(converted(images.numpy())[0], model(images))

    @staticmethod
    def same_gradients(traced, model, images) -> None:
        found = []
        for module in (traced, model):
            x = images.clone().requires_grad_()
            found.append(torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()]))
        assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_no_second_derivative_is_lost_in_a_compiled_graph(backend, device):
    x = draw.randn(8, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: vit.ops.gelu(x, backend=backend), backend="eager")
    (dx,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
    with pytest.raises(vit.BackendError, match="double backward"):
        dx.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_the_choice_of_a_backend_is_compiled(op):
    tensors, options = small(op)
    compiled = torch.compile(lambda given: call(op, "auto", given, options), fullgraph=True, backend="eager")
    assert compiled(tensors).equal(call(op, "auto", tensors, options))


@pytest.mark.parametrize("strict", [False, True])
def test_onnx_gets_ops_it_knows(backend, device, monkeypatch, strict):
    """On every version of torch: the oldest do not say that they export a program."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    x, weight = draw.randn(3, 4, device=device), draw.randn(5, 4, device=device)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return vit.ops.linear(x, weight, activation="gelu", backend=backend)

    graph = str(torch.export.export(Layer(), (x,), strict=strict).graph)
    assert "gelu" in graph
    assert "vit_" not in graph
