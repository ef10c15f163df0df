"""attention_rows beyond the list of cases: what attention multiplies with, alone and in company; what is refused."""

from __future__ import annotations

import math

import draw
import pytest
import torch
import vit
from conftest import NATIVE
from rounding import close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vit.backends import BackendError

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: In tokens: fewer than a tile of rows, several tiles, several blocks of keys.
SIZES = [(5, 2, 8), (197, 3, 64), (1300, 1, 40)]


@pytest.fixture(autouse=True)
def _built(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames:
        name = request.getfixturevalue("backend")
        if "attention_rows" not in NATIVE[name].lib.fields:
            pytest.skip(f"{name} has no attention_rows")


def by_hand(q: Tensor, k: Tensor, queries: list[int], scale: float) -> Tensor:
    """The formula, number by number, in float64: [B, H, R, L]."""
    b, _, h, d = q.shape
    rows = torch.empty(b, h, len(queries), k.shape[1], dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            for r, n in enumerate(queries):
                scores = [
                    scale * sum(float(q[i, n, j, e]) * float(k[i, m, j, e]) for e in range(d))
                    for m in range(k.shape[1])
                ]
                weights = [math.exp(s - max(scores)) for s in scores]
                rows[i, j, r] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return rows


def test_the_reference_is_the_formula():
    q, k = draw.randn(2, 4, 3, 5), draw.randn(2, 6, 3, 5)
    for scale in (None, 0.7, -2.0):
        rows = vit.ops.attention_rows(q, k, [3, 0], scale, backend="reference")
        close(rows, by_hand(q, k, [3, 0], 5**-0.5 if scale is None else scale), dtype=torch.float32)
        assert rows.dtype == torch.float32
    assert vit.ops.attention_rows(q.double(), k.double(), [1], backend="reference").dtype == torch.float64
    assert vit.ops.attention_rows(q.half(), k.half(), [1], backend="reference").dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_times_the_values_are_attention(backend, device, dtype, size):
    if dtype not in NATIVE[backend].dtypes:
        pytest.skip("not of its types")
    n, h, d = size
    qkv = draw.randn(2, n, 3, h, d, device=device).to(dtype)
    queries = [n - 1, 0, n // 2]
    rows = vit.ops.attention_rows(qkv, queries=queries, backend=backend)
    close(rows.sum(-1), torch.ones(2, h, 3), dtype=torch.float32)
    out = vit.ops.attention(qkv, backend=backend)[:, queries]
    values = qkv[:, :, 2].transpose(1, 2).to(rows.dtype)
    terms = (rows @ values.abs()).max().item()
    close((rows @ values).transpose(1, 2), out, dtype=dtype, largest=terms)
    parts = (qkv[:, :, 0], qkv[:, :, 1])
    assert vit.ops.attention_rows(*parts, queries, backend=backend).equal(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_row_is_the_same_alone(backend, device, dtype, size):
    """Bits: whatever the batch, the other queries, their order, and the number of threads."""
    if dtype not in NATIVE[backend].dtypes:
        pytest.skip("not of its types")
    n, h, d = size
    qkv = draw.randn(3, n, 3, h, d, device=device).to(dtype)
    torch.set_num_threads(1)
    whole = vit.ops.attention_rows(qkv, backend=backend)
    torch.set_num_threads(3)
    assert vit.ops.attention_rows(qkv, backend=backend).equal(whole)
    for queries in ([0], [n - 1], [3, 1, 1, 4], [*range(1, n, 2)], [*range(2, n)]):
        assert vit.ops.attention_rows(qkv[1:2], queries=queries, backend=backend).equal(whole[1:2, :, queries])


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_images_in_a_pack_have_the_rows_of_their_own_calls(backend, device, dtype):
    lengths, queries = [17, 64, 64, 5, 130], [4, 0, 2]
    qkv = draw.randn(1, sum(lengths), 3, 2, 24, device=device).to(dtype)
    rows = vit.ops.attention_rows(qkv, queries=queries, lengths=lengths, backend=backend)
    assert rows.shape == (1, 2, 3, sum(lengths))
    for image, found in zip(qkv.split(lengths, 1), rows.split(lengths, -1), strict=True):
        assert found.equal(vit.ops.attention_rows(image, queries=queries, backend=backend))


def check_compiled(backend: str, device: torch.device) -> None:
    qkv = draw.randn(2, 9, 3, 2, 16, device=device)
    compiled = torch.compile(
        lambda x: vit.ops.attention_rows(x, queries=[0, 8, 3], backend=backend), fullgraph=True, backend="eager"
    )
    assert compiled(qkv).equal(vit.ops.attention_rows(qkv, queries=[0, 8, 3], backend=backend))


def test_compiled():
    check_compiled("reference", torch.device("cpu"))


def test_compiled_for_a_backend_and_counted(backend, device):
    check_compiled(backend, device)
    q, k = draw.randn(2, 9, 3, 16, device=device), draw.randn(2, 7, 3, 16, device=device)
    with FlopCounterMode(display=False) as counter:
        vit.ops.attention_rows(q, k, [5, 0], backend=backend)
    assert counter.get_total_flops() == 2 * 2 * 3 * 2 * 7 * 16


@pytest.mark.parametrize("where", ["reference", "cpu", "mojo", "auto"])
def test_refusals(where):
    if where in NATIVE and NATIVE[where].unavailable() is not None:
        pytest.skip(f"{where} is not built")
    q, k = draw.randn(1, 6, 2, 8), draw.randn(1, 5, 2, 8)

    def run(q=q, k=k, *given, **more):
        return vit.ops.attention_rows(q, k, *given, **more, backend=where)

    with pytest.raises(ValueError, match=r"queries must be within 0\.\.5, the tokens of q, got 6"):
        run(q, k, [0, 6])
    with pytest.raises(ValueError, match=r"within 0\.\.5, the tokens of q, got -1"):
        run(q, k, [-1])
    with pytest.raises(TypeError, match=r"queries must be a list or tuple of integers, got 1\.5 in it"):
        run(q, k, [1.5])
    with pytest.raises(ValueError, match=r"give q and k, or one packed q \[B, N, 3, H, D\] alone, got q \[1, 6, 2, 8"):
        run(q, None)
    with pytest.raises(ValueError, match=r"differ in B, H or D, got q \[1, 6, 2, 8\], k \[1, 5, 2, 4\]"):
        run(q, k[..., :4])
    with pytest.raises(ValueError, match=r"attention_rows: lengths \[2, 3\] sum up to 5, and q has 6 tokens"):
        run(q, q, [0], lengths=[2, 3])
    with pytest.raises(ValueError, match="with lengths, queries must be given"):
        run(q, q, lengths=[2, 4])
    with pytest.raises(ValueError, match=r"within 0\.\.1, the tokens of the shortest image, got 2"):
        run(q, q, [2], lengths=[2, 4])
    with pytest.raises(BackendError, match=r"has no backward, .* Use torch\.no_grad\(\), or compute softmax\(scale q"):
        run(q.clone().requires_grad_(), k)
    with torch.no_grad():
        run(q.clone().requires_grad_(), k)
    if where in NATIVE:
        with pytest.raises(ValueError, match=r"q and k must have one dtype, got torch\.float32 and torch\.float64"):
            run(q, k.double())
        with pytest.raises(ValueError, match=r"head dimension 300 is not within 1\.\.256, .* use backend=\"reference"):
            run(draw.randn(1, 2, 1, 300), draw.randn(1, 2, 1, 300))


def test_a_backend_that_lacks_it_refuses_by_name():
    """Of a model too, whose forward it runs: neither the reference nor another backend stands in."""
    q = draw.randn(1, 3, 1, 8)
    for name, record in NATIVE.items():
        if record.unavailable() is None and "attention_rows" not in record.lib.fields:
            with pytest.raises(BackendError, match=f"backend '{name}' cannot run 'attention_rows'"):
                vit.ops.attention_rows(q, q, [0], backend=name)
