"""linear_int8: quantized rows and sums equal to the integer on every backend, what follows them within rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import draw
import pytest
import torch
import vit
from conftest import NATIVE
from int8_helpers import check_epilogue, check_rows_without_a_scale, layer
from vit.backends import BackendError
from vit.ops._linear_int8 import quantize_rows

SIZES = [(0, 3, 4), (1, 1, 1), (5, 7, 3), (3, 50, 64), (33, 100, 130), (197, 96, 768), (9, 10, 5000)]


@pytest.fixture(autouse=True)
def _built(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames:
        name = request.getfixturevalue("backend")
        if "linear_int8" not in NATIVE[name].lib.fields:  # type: ignore[attr-defined]
            pytest.skip(f"{name} has no linear_int8")


def test_rows_by_definition():
    """By hand: 127 at the largest, halves to even, tiny rows to 0 at scale 1, NaN where the row has no scale."""
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [-254.0, 1.0, 3.0, 5.0], [0.0] * 4, [2.0**-101] * 4])
    q, scale = quantize_rows(x)
    assert q.tolist() == [[127, 0, 2, -2], [-127, 0, 2, 2], [0] * 4, [0] * 4]
    assert scale.flatten().tolist() == [1.0, 2.0, 1.0, 1.0]
    for odd in (torch.nan, torch.inf, -torch.inf):
        q, scale = quantize_rows(torch.tensor([[1.0, odd]]))
        assert scale.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equal_to_the_integer(backend, device, size, dtype):
    """Without bias and activation y is exact: any other integer or sum would be other bits."""
    m, n, k = size
    x = draw.randn(m, k).to(dtype) * torch.exp(draw.randn(m, 1)).to(dtype)
    weight, scale = layer(n, k)
    y = vit.ops.linear_int8(x.to(device), weight.to(device), scale.to(device), backend=backend)
    assert torch.equal(y.cpu(), vit.ops.linear_int8(x, weight, scale, backend="reference"))


def test_halves_and_extremes(backend, device):
    """Every half of a row in turn, and every product at its limit: nothing saturates."""
    x = torch.cat([torch.arange(-127, 127.5, 0.5), torch.tensor([127.0])])[None]
    weight = torch.full((3, x.shape[1]), 127, dtype=torch.int8)
    weight[1] = -127
    weight[2, ::2] = -127
    x = torch.cat([x, torch.full_like(x, 127.0), torch.full_like(x, -127.0)])
    one = torch.ones(3)
    y = vit.ops.linear_int8(x.to(device), weight.to(device), one.to(device), backend=backend).cpu()
    expected = x.double().round() @ weight.double().T
    assert torch.equal(y, expected.float())


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "silu", "relu"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_epilogue(backend, device, activation, wide, dtype):
    check_epilogue(backend, device, activation, wide, dtype)


def test_rows_without_a_scale_are_nan_and_no_others(backend, device):
    check_rows_without_a_scale(backend, device)


def test_strided_rows_and_threads(backend, device):
    """A view of rows apart, the residual overwritten nowhere; the same bits from 1 thread and from many."""
    wide, (weight, scale) = draw.randn(150, 100).to(device), layer(60, 90)
    x, weight, scale = wide[:, :90], weight.to(device), scale.to(device)
    found = vit.ops.linear_int8(x, weight, scale, backend=backend)
    torch.set_num_threads(1)
    assert torch.equal(found, vit.ops.linear_int8(x.contiguous(), weight, scale, backend=backend))
    assert torch.equal(found[7:8], vit.ops.linear_int8(x[7:8], weight, scale, backend=backend))


LEVEL = """
import json, sys, torch, vit
sys.path.insert(0, "tests")
from int8_helpers import layer
import draw
found = []
for n, k in ((50, 64), (100, 131)):
    x, (weight, scale) = draw.randn(20, k), layer(n, k)
    weight[:, ::2] = 127
    y = vit.ops.linear_int8(x, weight, scale, backend="cpu")
    found.append(torch.equal(y, vit.ops.linear_int8(x, weight, scale, backend="reference")))
print(json.dumps([vit.backends()["cpu"]["isa"], found]))
"""


@pytest.mark.parametrize("level", vit.backends()["cpu"].get("isa available", "").split(", "))
def test_every_instruction_set_level(level):
    """Sums are exact also where products are not added in 32 bits at once."""
    if not level:
        pytest.skip("the cpu backend is not usable here")
    environment = os.environ | {"VIT_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LEVEL], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [level, [True, True]]


def test_compiled(backend, device):
    """torch.compile and fake tensors find the registered routine."""
    x, (weight, scale) = draw.randn(6, 32).to(device), layer(8, 32)
    weight, scale = weight.to(device), scale.to(device)
    compiled = torch.compile(
        lambda x: vit.ops.linear_int8(x, weight, scale, backend=backend), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x), vit.ops.linear_int8(x, weight, scale, backend=backend))


@pytest.mark.parametrize("where", ["reference", "cpu"])
def test_refusals(where):
    x, (weight, scale) = draw.randn(4, 8), layer(6, 8)
    if where == "cpu" and "linear_int8" not in getattr(NATIVE["cpu"].lib, "fields", {}):
        pytest.skip("the cpu backend has no linear_int8")

    def run(x=x, weight=weight, scale=scale, **more):
        return vit.ops.linear_int8(x, weight, scale, **more, backend=where)

    with pytest.raises(ValueError, match=r"differ in K: \[4, 7\] and \[6, 8\]"):
        run(x[:, :7])
    with pytest.raises(ValueError, match=r"weight must be int8, got torch.float32"):
        run(weight=weight.float())
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
        run(x.new_zeros(1, 131073), weight.new_zeros(6, 131073))
    with pytest.raises(BackendError, match="has no backward"):
        run(x.clone().requires_grad_())
    with torch.no_grad():
        run(x.clone().requires_grad_())
