"""linear_int8, linear_fp8: quantized rows equal on every backend, sums of integers too, those of floats within what may
be lost, what follows them within rounding."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import draw
import pytest
import quantized_helpers as helpers
import torch
import vit
from conftest import NATIVE, USABLE
from quantized_helpers import FORMS, layer
from torch import Tensor
from vit.backends import BackendError
from vit.ops.quantized import FP8, INT8, Format

SIZES = [(0, 3, 4), (1, 1, 1), (5, 7, 3), (3, 50, 64), (33, 100, 130), (197, 96, 768), (9, 10, 5000)]

pytestmark = pytest.mark.parametrize("form", **FORMS)


def call(form: Format, backend: str, *given: Tensor | str | None, **more: Tensor | str | None) -> Tensor:
    return getattr(vit.ops, form.routine)(*given, **more, backend=backend)


def has(name: str, form: Format) -> bool:
    return NATIVE[name].unavailable() is None and form.routine in NATIVE[name].lib.fields


@pytest.fixture(autouse=True)
def _built(request: pytest.FixtureRequest, form: Format) -> None:
    if "backend" in request.fixturenames:
        name = request.getfixturevalue("backend")
        if not has(name, form):
            pytest.skip(f"{name} has no {form.routine}")
        if name == "cuda" and form is FP8 and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("products of e4m3 begin with compute capability 8.9")


def test_rows_by_definition(form):
    """By hand: L at the largest, halves to even, tiny rows to 0 at scale 1, NaN where the row has no scale."""
    if form is INT8:
        x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [-254.0, 1.0, 3.0, 5.0], [0.0] * 4, [2.0**-101] * 4])
        expected = [[127, 0, 2, -2], [-127, 0, 2, 2], [0] * 4, [0] * 4]
    else:
        # Steps of 2 at 16, of 32 at 256; 2^-9 is the least number.
        x = torch.tensor(
            [[448.0, 17.0, 19.0, -272.0], [-896.0, 34.0, 2.0**-9, 3 * 2.0**-9], [0.0] * 4, [2.0**-101] * 4]
        )
        expected = [[448, 16, 20, -256], [-448, 16, 0, 2.0**-8], [0] * 4, [0] * 4]
    q, scale = form.quantize_rows(x)
    assert q.dtype == form.dtype
    assert q.float().tolist() == expected
    assert scale.flatten().tolist() == [1.0, 2.0, 1.0, 1.0]
    for odd in (torch.nan, torch.inf, -torch.inf):
        q, scale = form.quantize_rows(torch.tensor([[1.0, odd]]))
        assert scale.isnan().all()
        assert q.float().tolist() == [[0.0, 0.0]]


def test_the_largest_of_a_row_never_passes_the_limit(form):
    """Its quotient by the scale may be rounded to more than L; e4m3 would be NaN beyond, an integer -128."""
    x = draw.randn(20000, 1).exp()
    assert ((x / form.quantize_rows(x)[1]).max() > form.largest).item()
    for rows in (x, -x):
        assert form.quantize_rows(rows)[0].float().abs().unique().tolist() == [form.largest]


def test_e4m3_by_definition(form):
    """A sign, 4 bits of exponent with bias 7, 3 of fraction: the nearest of these numbers, of two the even one."""
    if form is not FP8:
        return  # integers are round()'s
    table = [(8 + f) * 2.0 ** (e - 10) if e else f * 2.0**-9 for e in range(16) for f in range(8)][:-1]
    assert torch.equal(torch.arange(127, dtype=torch.uint8).view(FP8.dtype).float(), torch.tensor(table))
    halves = [(a + b) / 2 for a, b in itertools.pairwise(table)]
    for x in [*table, *halves, *(draw.rand(200) * 448).tolist(), *(draw.rand(200) / 50).tolist()]:
        code = min(range(127), key=lambda i: (abs(table[i] - x), i % 2))
        q, scale = form.quantize_rows(torch.tensor([[x, -x, 448.0]]))
        assert scale.item() == 1
        assert q.view(torch.uint8).tolist() == [[code, code + 128, 126]]


@pytest.mark.parametrize("size", SIZES[1:4], ids=str)
def test_the_reference(size, form):
    """Against whole numbers and PyTorch in float64."""
    cpu = torch.device("cpu")
    helpers.check_exact(form, "reference", cpu, *size, torch.bfloat16)
    helpers.check_epilogue("reference", cpu, "gelu", True, torch.float32, form)
    helpers.check_rows_without_a_scale("reference", cpu, form)
    if form is FP8:
        helpers.check_weights_that_are_nan("reference", cpu)
        helpers.check_long_sums("reference", cpu)


def test_auto_chooses_for_each_call(form):
    x, (weight, scale) = draw.randn(4, 8), layer(6, 8, form)
    found = call(form, "auto", x, weight, scale)
    best = next((name for name in ("cpu", "mojo") if has(name, form)), "reference")
    assert torch.equal(found, call(form, best, x, weight, scale))


def test_conversion(backend, device, form):
    helpers.check_conversion(form, backend, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums(backend, device, size, dtype, form):
    m, n, k = size
    x = draw.randn(m, k).to(dtype) * torch.exp(draw.randn(m, 1)).to(dtype)
    helpers.check_sums(form, backend, device, x, *layer(n, k, form))


@pytest.mark.parametrize("size", SIZES[1:-1], ids=str)
def test_small_whole_numbers_are_exact(backend, device, size, form):
    helpers.check_exact(form, backend, device, *size, torch.float32)


def test_extremes(backend, device, form):
    """Every half of a row in turn, and every product at its limit: nothing saturates."""
    top = form.largest
    x = torch.cat([torch.arange(-127, 127.5, 0.5), torch.tensor([top])])[None]
    weight = torch.full((3, x.shape[1]), top)
    weight[1] = -top
    weight[2, ::2] = -top
    x = torch.cat([x, torch.full_like(x, top), torch.full_like(x, -top)])
    y = helpers.check_sums(form, backend, device, x, weight.to(form.dtype), torch.ones(3))
    expected = form.quantize_rows(x)[0].double() @ weight.double().T
    if form is INT8:
        assert torch.equal(y, expected.float())
    else:
        assert torch.equal(y[1:, :2], expected[1:, :2].float())  # of equal numbers nothing is cut off


def test_long_sums(backend, device, form):
    if form is INT8:
        x, weight = draw.randn(3, 131072), layer(2, 131072)
        helpers.check_sums(form, backend, device, x, *weight)
    else:
        helpers.check_long_sums(backend, device)
        helpers.check_sums(form, backend, device, draw.randn(3, 131072).abs(), *layer(2, 131072, form))


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "silu", "relu"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_epilogue(backend, device, activation, wide, dtype, form):
    helpers.check_epilogue(backend, device, activation, wide, dtype, form)


def test_rows_without_a_scale_are_nan_and_no_others(backend, device, form):
    helpers.check_rows_without_a_scale(backend, device, form)


def test_weights_that_are_nan(form, backend, device):
    if form is FP8:  # no integer is
        helpers.check_weights_that_are_nan(backend, device)


def test_strided_rows_and_threads(backend, device, form):
    """A view of rows apart, the residual overwritten nowhere; the same bits from 1 thread and from many."""
    wide, (weight, scale) = draw.randn(150, 100).to(device), layer(60, 90, form)
    x, weight, scale = wide[:, :90], weight.to(device), scale.to(device)
    found = call(form, backend, x, weight, scale)
    torch.set_num_threads(1)
    assert torch.equal(found, call(form, backend, x.contiguous(), weight, scale))
    assert torch.equal(found[7:8], call(form, backend, x[7:8], weight, scale))


LEVEL = """
import json, sys, torch, vit
sys.path.insert(0, "tests")
from quantized_helpers import layer
import draw
found = []
for n, k in ((50, 64), (100, 131)):
    x, (weight, scale) = draw.randn(20, k), layer(n, k)
    weight[:, ::2] = 127
    y = vit.ops.linear_int8(x, weight, scale, backend=sys.argv[1])
    found.append(torch.equal(y, vit.ops.linear_int8(x, weight, scale, backend="reference")))
print(json.dumps([vit.backends()[sys.argv[1]]["isa"], found]))
"""


@pytest.mark.parametrize(
    ("name", "level"),
    [(name, level) for name in USABLE for level in NATIVE[name].info().get("isa available", "").split(", ") if level],
)
def test_every_instruction_set_level(name, level, form):
    """Sums are exact also where products are not added in 32 bits at once."""
    if not has(name, form):
        pytest.skip(f"{name} has no {form.routine}")
    environment = os.environ | {"VIT_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LEVEL, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [level, [True, True]]


def test_compiled(form):
    """torch.compile and fake tensors find the formula."""
    check_compiled(form, "reference", torch.device("cpu"))


def test_compiled_for_a_backend(backend, device, form):
    """And the registered routine."""
    check_compiled(form, backend, device)


def check_compiled(form: Format, backend: str, device: torch.device) -> None:
    x, (weight, scale) = draw.randn(6, 32).to(device), layer(8, 32, form)
    weight, scale = weight.to(device), scale.to(device)
    compiled = torch.compile(lambda x: call(form, backend, x, weight, scale), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), call(form, backend, x, weight, scale))


@pytest.mark.parametrize("where", ["reference", "cpu", "mojo"])
def test_refusals(where, form):
    x, (weight, scale) = draw.randn(4, 8), layer(6, 8, form)
    if where != "reference" and not has(where, form):
        pytest.skip(f"{where} has no {form.routine}")

    def run(x=x, weight=weight, scale=scale, **more):
        return call(form, where, x, weight, scale, **more)

    with pytest.raises(ValueError, match=r"differ in K: \[4, 7\] and \[6, 8\]"):
        run(x[:, :7])
    wanted = str(form.dtype).removeprefix("torch.")
    for other in (weight.float(), weight.view(torch.uint8)):
        with pytest.raises(ValueError, match=f"{form.routine}: weight must be {wanted}, got {other.dtype}"):
            run(weight=other)
    with pytest.raises(ValueError, match=r"x must be float32, bfloat16 or float16, got torch.float64"):
        run(x.double())
    with pytest.raises(ValueError, match=r"weight_scale must have shape \[6\], got \[5\]"):
        run(scale=scale[:5])
    with pytest.raises(ValueError, match=r"bias must have shape \[6\], got \[1\]"):
        run(bias=scale[:1])
    with pytest.raises(ValueError, match=r"residual must have the shape of the result \[4, 6\]"):
        run(residual=x)
    with pytest.raises(ValueError, match="activation must be one of"):
        run(activation="elu")
    with pytest.raises(ValueError, match="at most 131072"):
        run(x.new_zeros(1, 131073), torch.zeros(6, 131073).to(form.dtype))
    with pytest.raises(BackendError, match="has no backward"):
        run(x.clone().requires_grad_())
    with torch.no_grad():
        run(x.clone().requires_grad_())


def test_a_backend_that_lacks_it_refuses_by_name(form):
    """Neither another routine nor the reference runs in its place."""
    x, (weight, scale) = draw.randn(4, 8), layer(6, 8, form)
    for name in NATIVE:
        if NATIVE[name].unavailable() is None and not has(name, form):
            with pytest.raises(BackendError, match=rf"backend '{name}' cannot run '{form.routine}'"):
                call(form, name, x, weight, scale)
