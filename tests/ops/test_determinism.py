"""The same bits every time: run after run, with any number of threads, whatever else is in the batch."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import draw
import pytest
import torch
import vit
from conftest import NATIVE
from test_memory import same_bits
from torch import Tensor
from vit.backends._host import HostBackend
from vit.ops import OPS
from vit.parity import backend_ops, cases
from vit.parity.problems import DEFINITIONS, build
from vit.parity.runner import call as run_problem

DTYPES = [torch.float32, torch.bfloat16]


def results(backend: str, device: torch.device, op: str) -> dict[str, Tensor]:
    """Outputs and gradients of some cases with work for several threads."""
    ops = backend_ops(backend)
    found = {}
    for case in cases(device.type, ops=[op], groups=["regular", "odd"], directions=["bwd"]):
        problem = build(case, device)
        got = run_problem(problem, lambda t: DEFINITIONS[op].call(ops, case, t))  # noqa: B023
        found |= {f"{case.id} {name}": x for name, x in got.items()}
    return found


@pytest.mark.parametrize("op", OPS)
def test_two_runs_and_any_number_of_threads_agree_bit_for_bit(backend, device, op):
    torch.set_num_threads(2)
    want = results(backend, device, op)
    for threads in (2, 1, 3, 5):
        torch.set_num_threads(threads)
        for name, x in results(backend, device, op).items():
            assert same_bits(x, want[name]), f"{name} with {threads} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(192, 192), (384, 1536), (1000, 384), (10, 64), (53, 37), (1, 768), (24, 2500)])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_row_of_linear_does_not_depend_on_the_batch(backend, device, n, k, dtype, activation):
    x = draw.randn(400, k, device=device).to(dtype)
    w, b = draw.randn(n, k, device=device).to(dtype), draw.randn(n, device=device).to(dtype)

    def f(x: Tensor) -> Tensor:
        return vit.ops.linear(x, w, b, activation=activation, backend=backend)

    whole = f(x)
    for m in (1, 2, 3, 7, 8, 9, 15, 17, 31, 50, 97, 197, 399):
        assert f(x[:m]).equal(whole[:m]), f"first {m} rows"
        assert f(x[-m:]).equal(whole[-m:]), f"last {m} rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_norms_activations_and_matmul_does_not_depend_on_the_batch(backend, device, dtype):
    x, w = draw.randn(200, 97, device=device).to(dtype), draw.randn(97, 33, device=device).to(dtype)
    ones = torch.ones(97, device=device, dtype=dtype)
    for f in (
        lambda x: vit.ops.layer_norm(x, ones, ones, backend=backend),
        lambda x: vit.ops.rms_norm(x, ones, backend=backend),
        lambda x: vit.ops.swiglu(x[:, :96], backend=backend),
        lambda x: vit.ops.rotary(x[:, None, None, :96], w.view(1, -1)[:, :192], pairing="half", backend=backend),
        lambda x: vit.ops.linear(x, ones.expand(5, 97), scale=w[0, :5], activation="silu", backend=backend),
        lambda x: vit.ops.gelu(x, backend=backend),
        lambda x: vit.ops.gelu(x, "tanh", backend=backend),
        lambda x: vit.ops.matmul(x, w, backend=backend),
    ):
        whole = f(x)
        for m in (1, 2, 3, 8, 13, 50, 199):
            assert f(x[:m]).equal(whole[:m]), f"first {m} rows"
            assert f(x[-m:]).equal(whole[-m:]), f"last {m} rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_gradient_of_a_row_does_not_depend_on_the_batch(backend, device, dtype):
    """With and without parameters, for which a compiler makes loops of their own."""
    if dtype not in NATIVE[backend].dtypes:
        pytest.skip("not of its types")
    x, dy = draw.randn(2, 60, 96, device=device).to(dtype)
    w = draw.randn(96, device=device).to(dtype)
    for f in (
        lambda x: vit.ops.layer_norm(x, backend=backend),
        lambda x: vit.ops.layer_norm(x, w, w, backend=backend),
        lambda x: vit.ops.rms_norm(x, backend=backend),
        lambda x: vit.ops.rms_norm(x, w, backend=backend),
        lambda x: vit.ops.swiglu(x.repeat(1, 2), backend=backend),
        lambda x: vit.ops.rotary(x[:, None, None], w.repeat(2)[None], pairing="half", backend=backend),
        lambda x: vit.ops.gelu(x, backend=backend),
        lambda x: vit.ops.gelu(x, "silu", backend=backend),
    ):

        def gradient(part: slice) -> Tensor:
            rows = x[part].clone().requires_grad_()
            return torch.autograd.grad(f(rows), rows, dy[part].view_as(f(rows)))[0]  # noqa: B023

        whole = gradient(slice(0, 60))
        for m in (1, 2, 3, 8, 13, 50):
            assert gradient(slice(0, m)).equal(whole[:m]), f"first {m} rows"
            assert gradient(slice(60 - m, 60)).equal(whole[-m:]), f"last {m} rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(197, 3, 64), (50, 12, 64), (17, 8, 8), (130, 2, 80)])
def test_attention_of_an_image_does_not_depend_on_the_batch(backend, device, tokens, heads, dim, dtype):
    qkv = draw.randn(5, tokens, 3, heads, dim, device=device).to(dtype)
    whole = vit.ops.attention(*qkv.unbind(2), backend=backend)
    for b in (1, 2, 3, 4):
        assert vit.ops.attention(*qkv[:b].unbind(2), backend=backend).equal(whole[:b])
        assert vit.ops.attention(*qkv[-b:].unbind(2), backend=backend).equal(whole[-b:])
    a, b = draw.randn(6, 19, 23, device=device).to(dtype), draw.randn(6, 23, 29, device=device).to(dtype)
    product = vit.ops.matmul(a, b, backend=backend)
    assert vit.ops.matmul(a[2:3], b[2:3], backend=backend).equal(product[2:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_logits_of_an_image_do_not_depend_on_the_batch(backend, device, dtype):
    model = vit.create("vit_tiny_patch16_224", backend=backend, device=device, dtype=dtype, depth=2).eval()
    images = draw.randn(5, 3, 224, 224, device=device).to(dtype)
    with torch.no_grad():
        whole = model(images)
        for b in (1, 2, 3):
            assert model(images[:b]).equal(whole[:b])


# ---- threads ----


def test_the_number_of_threads_is_asked_at_every_call(backend, device):
    record = NATIVE[backend]
    if not isinstance(record, HostBackend):
        pytest.skip("it has threads of its own")
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        assert record.context(device)[2] == threads


def test_several_python_threads_may_call_at_once(backend, device):
    """Kernels run without the GIL: four threads, each with its own inputs, all start together."""
    torch.set_num_threads(2)
    groups = [cases(device.type, ops=[op], groups=["regular"], directions=["bwd"], dtypes=["float32"]) for op in OPS]
    problems = [build(group[0], device) for group in groups]

    def work(problem):
        return run_problem(problem, lambda t: DEFINITIONS[problem.case.op].call(backend_ops(backend), problem.case, t))

    want = [work(problem) for problem in problems]
    together = threading.Barrier(4)

    def loop(first: int) -> None:
        torch.set_num_threads(2)
        together.wait(60)
        for i in range(12):
            at = (first + i) % len(problems)
            for name, x in work(problems[at]).items():
                assert same_bits(x, want[at][name]), f"{problems[at].case.id}: {name}"

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(loop, i) for i in range(4)]:
            future.result(120)


def run_script(text: str, backend: str) -> str:
    """Runs a program in a fresh process; a hang is a failure."""
    text = f"import torch, vit\nfrom vit.support.random import normal\nbackend = {backend!r}\n{text}"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_thread_never_starts_a_pool(backend, device):
    if not isinstance(NATIVE[backend], HostBackend):
        pytest.skip("it has threads of its own")
    text = """
import os
torch.set_num_threads(1)
x, w = normal((512, 512), "x").requires_grad_(), normal((512, 512), "w")
def count(): return len(os.listdir("/proc/self/task"))
def step():
    vit.ops.linear(vit.ops.gelu(x, backend=backend), w, backend=backend)
    q = vit.ops.layer_norm(x, backend=backend).view(1, 512, 8, 64)
    vit.ops.matmul(vit.ops.attention(q, q, q, backend=backend), w[:64], backend=backend)
before = count()
step()
alone = count()
torch.set_num_threads(2)
step()
print(alone - before, count() - before)
"""
    alone, two = map(int, run_script(text, backend).split())
    assert alone == 0
    assert two == 1


def test_a_forked_data_loader_worker_may_call(backend, device):
    """Workers have one thread, and a forked OpenMP pool hangs: one thread must not touch it."""
    if device.type != "cpu":
        pytest.skip("a forked process cannot use a GPU")
    text = """
from torch.utils.data import DataLoader, Dataset
torch.set_num_threads(2)
w = normal((256, 256), "w")
want = vit.ops.linear(torch.ones(300, 256), w, activation="gelu", backend=backend)
class Data(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        y = vit.ops.linear(torch.ones(300, 256), w, activation="gelu", backend=backend)
        q = y.view(1, 300, 4, 64)
        vit.ops.attention(q, q, q, backend=backend)
        vit.ops.layer_norm(y, backend=backend)
        return y
for batch in DataLoader(Data(), num_workers=2, multiprocessing_context="fork"):
    assert batch[0].equal(want)
print("ok")
"""
    assert run_script(text, backend).strip() == "ok"
