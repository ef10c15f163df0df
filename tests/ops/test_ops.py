"""Every case of the list on every native backend of this machine, and what the ops promise beyond numbers."""

from __future__ import annotations

import subprocess
import sys

import draw
import pytest
import torch
import torch.nn.functional as F
import vit
from conftest import NATIVE, USABLE
from rounding import close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from vit.backends import BackendError
from vit.ops import OPS
from vit.ops._gelu import APPROXIMATE
from vit.parity import Case, backend_ops, cases, run
from vit.parity.problems import DEFINITIONS, build

PARITY = [(name, case) for name in USABLE for case in cases(NATIVE[name].default_device().type)]

#: One small call of each op: positional tensors, then options.
SMALL = {
    "layer_norm": ({"x": (2, 5, 16), "weight": (16,), "bias": (16,)}, {}),
    "rms_norm": ({"x": (2, 5, 16), "weight": (16,)}, {}),
    "gelu": ({"x": (2, 5, 16)}, {}),
    "swiglu": ({"x": (2, 5, 16), "gate": (2, 5, 16)}, {}),
    "matmul": ({"a": (2, 5, 8), "b": (2, 8, 6)}, {}),
    "linear": (
        {"x": (2, 5, 8), "weight": (6, 8), "bias": (6,), "residual": (2, 5, 6), "scale": (6,)},
        {"activation": "gelu"},
    ),
    "rotary": ({"x": (2, 5, 2, 8), "table": (2, 4, 16)}, {"prefix": 1}),
    "attention": ({"q": (2, 5, 2, 8), "k": (2, 7, 2, 8), "v": (2, 7, 2, 8)}, {}),
}
#: Ops of more than one tensor.
SEVERAL = [op for op, (tensors, _) in SMALL.items() if len(tensors) > 1]


def small(op: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", grad: bool = False):
    """Tensors and options of one small call."""
    shapes, options = SMALL[op]
    tensors = {name: draw.randn(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    return {name: x.requires_grad_(grad) for name, x in tensors.items()}, options


def call(op: str, backend: str, tensors: dict[str, Tensor], options: dict) -> Tensor:
    return getattr(vit.ops, op)(**tensors, **options, backend=backend)


# ---- numbers ----


@pytest.mark.parametrize(("name", "case"), PARITY, ids=[f"{name}-{case.id}" for name, case in PARITY])
def test_parity(name: str, case: Case):
    result = run(case, backend_ops(name), NATIVE[name].default_device())
    if result.skipped and name not in ("cpu", "mojo", "sycl"):
        pytest.skip(result.text)
    assert result.ok, result.text


@pytest.mark.parametrize("name", ["reference", *(n for n in USABLE if torch.float64 in NATIVE[n].dtypes)])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(name, op):
    device = "cpu" if name == "reference" else NATIVE[name].default_device()
    tensors, options = small(op, torch.float64, device, grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: call(op, name, dict(zip(tensors, t, strict=True)), options), tuple(tensors.values())
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"])
def test_gradcheck_of_the_activations(backend, device, activation):
    if torch.float64 not in NATIVE[backend].dtypes:
        pytest.skip("no float64")
    x = draw.randn(3, 7, dtype=torch.float64, device=device, requires_grad=True)
    w = draw.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)
    approximate = {name: approximate for approximate, name in APPROXIMATE.items()}[activation]
    assert torch.autograd.gradcheck(lambda x, w: vit.ops.linear(x, w, activation=activation, backend=backend), (x, w))
    assert torch.autograd.gradcheck(lambda x: vit.ops.gelu(x, approximate, backend=backend), (x,))


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gelu_is_accurate_in_its_tails(backend, device, approximate):
    """Element by element: twice torch's own error or 4 eps of |x|, where max|y| would hide a wrong tail."""
    x = torch.cat([torch.linspace(-12, 12, 100_001), 10.0 ** torch.linspace(-30, 0, 1000)]).to(device)
    truth = vit.ops.gelu(x.double(), approximate, backend="reference")
    error = (vit.ops.gelu(x, approximate, backend=backend).double() - truth).abs()
    own = (vit.ops.gelu(x, approximate, backend="reference").double() - truth).abs()
    bound = 2 * own + 4 * torch.finfo(torch.float32).eps * x.abs().clamp_max(1)
    worst = (error - bound).argmax()
    assert (error <= bound).all(), f"x = {x[worst]:.6g}: error {error[worst]:.3g}, bound {bound[worst]:.3g}"


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gelu_of_infinities_is_what_the_formula_says(backend, device, dtype, approximate):
    if dtype not in NATIVE[backend].dtypes:
        pytest.skip(f"no {dtype}")
    x = torch.tensor([torch.inf, -torch.inf] * 20, dtype=dtype, device=device)
    for n in (40, 2):
        y = vit.ops.gelu(x[:n], approximate, backend=backend)
        assert y[::2].isposinf().all()
        assert (y[1::2] == 0).all() if approximate == "relu" else y[1::2].isnan().all()


# ---- gradients in unusual circumstances ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-44, 1e-46, 1e-310])
def test_an_eps_that_is_zero_in_float32_keeps_zeros_finite(backend, device, eps, dtype):
    x = torch.zeros(2, 7, dtype=dtype, device=device)
    for name in (backend, "reference"):
        assert vit.ops.rms_norm(x, eps=eps, backend=name).equal(x)
        assert vit.ops.layer_norm(x, torch.ones_like(x[0]), torch.zeros_like(x[0]), eps, backend=name).equal(x)


@pytest.mark.parametrize("op", OPS)
def test_a_stride_0_gradient_is_read_correctly(backend, device, op):
    """sum().backward() sends one number with stride 0."""
    tensors, options = small(op, device=device, grad=True)
    call(op, backend, tensors, options).sum().backward()
    got = {name: x.grad.clone() for name, x in tensors.items()}
    y = call(op, backend, tensors, options)
    want = torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y))
    for (name, grad), other in zip(got.items(), want, strict=True):
        assert grad.equal(other), name


@pytest.mark.parametrize("op", OPS)
def test_only_wanted_gradients_are_computed(backend, device, op):
    """Each subset of inputs that require a gradient gives the same gradients as all of them."""
    tensors, options = small(op, device=device, grad=True)
    y = call(op, backend, tensors, options)
    dy = draw.randn_like(y)
    want = dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), dy), strict=True))
    for name in tensors:
        alone = {other: x.detach().requires_grad_(other == name) for other, x in tensors.items()}
        call(op, backend, alone, options).backward(dy)
        assert alone[name].grad.equal(want[name]), name
        assert all(x.grad is None for other, x in alone.items() if other != name)


def test_gradient_reaches_a_packed_projection(backend, device):
    qkv = draw.randn(2, 9, 3, 2, 16, device=device, requires_grad=True)
    exact = qkv.detach().cpu().double().requires_grad_()
    dy = draw.randn(2, 9, 2, 16, device=device)
    vit.ops.attention(*qkv.unbind(2), backend=backend).backward(dy)
    vit.ops.attention(*exact.unbind(2), backend="reference").backward(dy.cpu().double())
    close(qkv.grad, exact.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_projection_is_attention_of_its_parts(backend, device, dtype):
    """Given alone, [B, N, 3, H, D] gives the same bits as its three views, and a gradient in one piece."""
    packed = draw.randn(2, 9, 3, 2, 16, device=device, dtype=dtype).requires_grad_()
    parts = packed.detach().clone().requires_grad_()
    y, z = vit.ops.attention(packed, backend=backend), vit.ops.attention(*parts.unbind(2), backend=backend)
    assert y.equal(z)
    assert y.detach().equal(vit.ops.attention(packed.detach(), backend=backend))
    dy = draw.randn_like(y)
    (grad,) = torch.autograd.grad(y, packed, dy)
    assert grad.is_contiguous()
    assert grad.equal(torch.autograd.grad(z, parts, dy)[0])


@pytest.mark.parametrize("queries", [1, 4, 9])
def test_only_the_first_tokens_ask(backend, device, queries):
    """`queries` gives the bits of the first rows; tokens that do not ask have no gradient as queries."""
    packed = draw.randn(2, 9, 3, 2, 16, device=device, requires_grad=True)
    whole = vit.ops.attention(packed, backend=backend)
    y = vit.ops.attention(packed, queries=queries, backend=backend)
    assert y.equal(whole[:, :queries])
    q, k, v = (t.detach() for t in packed.unbind(2))
    assert y.detach().equal(vit.ops.attention(q, k, v, queries=queries, backend=backend))
    dy = draw.randn_like(y)
    (grad,) = torch.autograd.grad(y, packed, dy)
    padded = F.pad(dy, (0, 0, 0, 0, 0, 9 - queries))
    close(grad, torch.autograd.grad(whole, packed, padded)[0])
    assert not grad[:, queries:, 0].any()


@pytest.mark.parametrize("queries", [0, 10, -1])
def test_queries_that_are_not_there_are_refused(backend, device, queries):
    with pytest.raises(ValueError, match=rf"^vit\.ops\.attention: queries must be within 1\.\.9.*got {queries}"):
        vit.ops.attention(draw.randn(2, 9, 3, 2, 16, device=device), queries=queries, backend=backend)


def test_a_packed_projection_is_cast_by_autocast(backend, device):
    packed = draw.randn(2, 9, 3, 2, 16, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = vit.ops.attention(packed, backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert packed.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 9, 3, 32), (2, 9, 2, 2, 16), (2, 9, 3, 2, 1, 16)], ids=str)
def test_what_is_not_a_packed_projection_is_refused(backend, device, shape):
    with pytest.raises(ValueError, match=r"^vit\.ops\.attention: .*packed.*\["):
        vit.ops.attention(draw.randn(shape, device=device), backend=backend)
    with pytest.raises(ValueError, match=r"^vit\.ops\.attention: .*packed.*k \["):
        vit.ops.attention(draw.randn(shape, device=device), draw.randn(2, 9, 2, 16, device=device), backend=backend)


def test_self_attention_of_one_tensor(backend, device):
    x = draw.randn(2, 9, 2, 16, device=device, requires_grad=True)
    exact = x.detach().cpu().double().requires_grad_()
    vit.ops.attention(x, x, x, backend=backend).sum().backward()
    vit.ops.attention(exact, exact, exact, backend="reference").sum().backward()
    close(x.grad, exact.grad)


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_left_alone(backend, device, op):
    tensors, options = small(op, device=device, grad=True)
    before = {name: x.detach().clone() for name, x in tensors.items()}
    y = call(op, backend, tensors, options)
    dy = draw.randn_like(y)
    kept = dy.clone()
    torch.autograd.grad(y, list(tensors.values()), dy)
    assert all(x.equal(before[name]) for name, x in tensors.items())
    assert dy.equal(kept)


@pytest.mark.parametrize("op", OPS)
def test_views_that_are_negated_when_read(backend, device, op):
    """The imaginary part of a conjugated tensor has the memory of the tensor itself and the other sign."""
    tensors, options = small(op, device=device)
    lazy = {name: torch.complex(x, -x).conj().imag for name, x in tensors.items()}
    assert all(x.is_neg() for x in lazy.values())
    results = []
    for inputs in (tensors, lazy):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        y = call(op, backend, leaves, options)
        results.append([y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))])
    for got, want in zip(*results, strict=True):
        assert got.equal(want)


def test_a_changed_input_is_noticed_by_the_backward(backend, device):
    x = draw.randn(4, 8, device=device)
    w = draw.randn(3, 8, device=device, requires_grad=True)
    y = vit.ops.linear(x, w, backend=backend)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- what is not offered, and wrong arguments ----


@pytest.mark.parametrize("op", OPS)
def test_the_reference_can_be_differentiated_twice(op):
    tensors, options = small(op, grad=True)
    first = next(iter(tensors))
    with sdpa_kernel(SDPBackend.MATH):
        y = call(op, "reference", tensors, options)
        (grad,) = torch.autograd.grad(y.square().sum(), tensors[first], create_graph=True)
    grad.sum().backward()
    assert tensors[first].grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("op", OPS)
def test_transforms_say_what_to_use_instead(backend, device, op):
    tensors, options = small(op, device=device, grad=True)
    first = next(iter(tensors))

    def f(x: Tensor) -> Tensor:
        return call(op, backend, tensors | {first: x}, options).sum()

    x = tensors[first].detach()
    forward_mode = torch.autograd.forward_ad
    match = 'backend="reference"'
    with pytest.raises(BackendError, match=match):
        torch.func.grad(f)(x)
    with pytest.raises(BackendError, match=match):
        torch.vmap(f)(x[None])
    with pytest.raises(BackendError, match=match):
        torch.func.jvp(f, (x,), (x,))
    with forward_mode.dual_level(), pytest.raises(BackendError, match=match):
        f(forward_mode.make_dual(x, x))
    y = call(op, backend, tensors, options)
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[first], create_graph=True)
    with pytest.raises(BackendError, match=match):
        grad.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_fake_and_meta_tensors_never_reach_a_kernel(backend, device, op):
    tensors, options = small(op, device=device)
    want = call(op, backend, tensors, options)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {name: mode.from_tensor(x).requires_grad_() for name, x in tensors.items()}
        y = call(op, backend, fakes, options)
        grads = torch.autograd.grad(y.sum(), list(fakes.values()))
    assert (y.shape, y.dtype, y.device) == (want.shape, want.dtype, want.device)
    assert [g.shape for g in grads] == [x.shape for x in tensors.values()]
    with pytest.raises(BackendError, match=r"needs tensors on .*, got meta"):
        call(op, backend, {name: x.to("meta") for name, x in tensors.items()}, options)


@pytest.mark.parametrize("op", OPS)
def test_a_dtype_the_backend_lacks_is_refused_with_reasons(backend, device, op):
    lacking = [d for d in (torch.float16, torch.float64, torch.int32) if d not in NATIVE[backend].dtypes]
    for dtype in lacking:
        shapes, options = SMALL[op]
        tensors = {name: torch.ones(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        with pytest.raises(BackendError, match=f"dtype {str(dtype)[6:]} is not one of"):
            call(op, backend, tensors, options)


@pytest.mark.parametrize("op", SEVERAL)
def test_tensors_on_two_devices_are_refused(backend, device, op):
    tensors, options = small(op, device=device)
    last = list(tensors)[-1]
    tensors[last] = tensors[last].to("meta")
    with pytest.raises((ValueError, BackendError), match=r"device|meta"):
        call(op, backend, tensors, options)


WRONG_SHAPES = {
    "layer_norm": [{"weight": (15,)}, {"bias": (17,)}, {"x": ()}, {"weight": (1, 16)}],
    "rms_norm": [{"weight": (15,)}, {"x": ()}, {"weight": (1, 16)}],
    "gelu": [],
    "swiglu": [{"x": ()}, {"gate": (2, 5, 8)}, {"gate": (5, 16)}],
    "matmul": [{"b": (2, 7, 6)}, {"a": (3, 5, 8)}],
    "linear": [
        {"weight": (6, 9)},
        {"bias": (5,)},
        {"residual": (2, 5, 7)},
        {"weight": (8,)},
        {"x": ()},
        {"scale": (5,)},
    ],
    "rotary": [
        {"x": (2, 5, 16)},
        {"x": (2, 5, 2, 7)},
        {"table": (5, 16)},
        {"table": (4, 8)},
        {"table": (3, 4, 16)},
        {"table": (3, 1, 4, 16)},
        {"table": (1, 2, 1, 4, 16)},
    ],
    "attention": [
        {"q": (2, 5, 16)},
        {"k": (2, 7, 2, 16)},
        {"v": (2, 6, 2, 8)},
        {"k": (3, 7, 2, 8), "v": (3, 7, 2, 8)},
        {"k": (2, 0, 2, 8), "v": (2, 0, 2, 8)},
    ],
}


@pytest.mark.parametrize(
    ("op", "shapes"), [(op, s) for op, all_ in WRONG_SHAPES.items() for s in all_], ids=lambda v: str(v)
)
def test_wrong_shapes_are_refused_with_the_shapes(backend, device, op, shapes):
    tensors, options = small(op, device=device)
    tensors |= {name: draw.randn(shape, device=device) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=rf"^vit\.ops\.{op}: .*\[.*\]|^vit\.ops\.{op}: .*scalar"):
        call(op, backend, tensors, options)


@pytest.mark.parametrize("name", ["auto", "reference", *NATIVE])
@pytest.mark.parametrize("op", OPS)
def test_what_is_no_tensor_is_refused_by_name(name, op):
    tensors, options = small(op)
    for argument, x in tensors.items():
        with pytest.raises(TypeError, match=rf"^vit\.ops\.{op}: {argument} must be a torch\.Tensor, got ndarray$"):
            call(op, name, tensors | {argument: x.numpy()}, options)
    with pytest.raises(TypeError, match="got NoneType"):
        call(op, name, tensors | {next(iter(tensors)): None}, options)


@pytest.mark.parametrize("op", SEVERAL)
def test_mixed_dtypes_are_refused_or_documented(backend, device, op):
    """Only float32 next to a narrower type has a meaning: parameters of layer_norm, the residual of linear."""
    tensors, options = small(op, torch.bfloat16, device)
    second = list(tensors)[1]
    tensors[second] = tensors[second].to(torch.float32)
    if op in ("layer_norm", "rms_norm", "rotary"):
        assert call(op, backend, tensors, options).dtype == torch.bfloat16
        return
    with pytest.raises(ValueError, match="one dtype"):
        call(op, backend, tensors, options)


def test_options_outside_the_contract_are_refused(backend, device):
    x, w = draw.randn(2, 8, device=device), draw.randn(4, 8, device=device)
    with pytest.raises(ValueError, match="'elu'"):
        vit.ops.linear(x, w, activation="elu", backend=backend)
    with pytest.raises(ValueError, match="'fast'"):
        vit.ops.gelu(x, approximate="fast", backend=backend)
    wide = draw.randn(1, 2, 1, 257, device=device)
    with pytest.raises((ValueError, BackendError), match="257"):
        vit.ops.attention(wide, wide, wide, backend=backend)
    assert vit.ops.attention(wide, wide, wide).shape == wide.shape, "the reference takes any"
    with pytest.raises(ValueError, match="head dimension 0 "):
        vit.ops.attention(wide[..., :0], wide[..., :0], wide[..., :0], backend=backend)
    with pytest.raises(ValueError, match="known are auto"):
        vit.ops.gelu(x, backend="cpuu")


# ---- autocast ----


@pytest.mark.parametrize("op", OPS)
def test_autocast_follows_torch(backend, device, op):
    """Products run in bfloat16, norms and GELU keep their dtype; the gradient of a parameter has its own dtype."""
    tensors, options = small(op, device=device, grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = call(op, backend, tensors, options)
        native = call(op, "reference", tensors, options)
    assert y.dtype == native.dtype
    y.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in tensors.values())
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in tensors.items()}
    call(op, "reference", exact, options).sum().backward()
    for name, x in tensors.items():
        close(x.grad, exact[name].grad, dtype=torch.bfloat16, what=name)


@pytest.mark.parametrize("op", OPS)
def test_autocast_to_a_dtype_that_no_kernel_has(op):
    """backend="auto" runs what PyTorch has, a backend that is named says what it lacks."""
    tensors, options = small(op, grad=True)
    with torch.autocast("cpu", torch.float16):
        y = call(op, "auto", tensors, options)
        truth = call(op, "reference", tensors, options)
        assert y.dtype == truth.dtype
        # sycl has float16: it may differ from PyTorch by a few of its roundings, of products or of the result.
        close(y, truth, 4, dtype=torch.float16)
        if y.dtype == torch.float16 and "cpu" in USABLE:
            with pytest.raises(vit.BackendError, match="float16 is not one of float32, float64, bfloat16"):
                call(op, "cpu", tensors, options)
    y.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in tensors.values())


def test_the_definitions_of_the_case_list_cover_all_ops():
    assert set(DEFINITIONS) == {*OPS, "attention_rows"}
    assert set(SMALL) == set(OPS)


def test_empty_results_have_the_right_shape(backend, device):
    """The corner cases check numbers; this one also the shape of gradients of nothing."""
    for case in cases(device.type, groups=["corner"], directions=["bwd"], pattern="[bmnh]0"):
        problem = build(case, device)
        leaves = {name: x.detach().requires_grad_() for name, x in problem.tensors.items()}
        y = DEFINITIONS[case.op].call(backend_ops(backend), case, leaves)
        y.sum().backward()
        for name, x in leaves.items():
            assert x.grad.shape == x.shape, f"{case.id}: {name}"
            assert not x.grad.isnan().any(), f"{case.id}: {name}"


def test_import_does_not_bring_the_compiler():
    """torch._dynamo alone takes a second; the whole import of vit may take 0.3 s beyond torch's own."""
    script = "import sys, torch; before = set(sys.modules); import vit; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    brought = result.stdout.split()
    assert "vit.ops" in brought
    assert not {"torch._dynamo", "torch._inductor", "sympy", "timm", "matplotlib"} & set(brought)
