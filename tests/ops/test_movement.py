"""Between the ops: nothing of PyTorch runs on threads of the CPU, so that a forked child works as its parent did."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import draw
import pytest
import torch
import vit
from conftest import NATIVE
from vit.ops.launch import move
from vit.ops.movement import KernelMovement, Movement, of


@pytest.fixture
def moving(backend: str) -> str:
    if not NATIVE[backend].moves:
        pytest.skip("PyTorch's own copies start no threads of the CPU on this device")
    return backend


#: What PyTorch may do inside a forward and backward: nothing that works on elements, so nothing in parallel.
VIEWS = {
    "alias", "as_strided", "contiguous", "detach", "detach_", "empty", "empty_like", "empty_strided", "expand",
    "flatten", "frombuffer", "is_nonzero", "narrow", "new_empty", "permute", "reshape", "resize_", "_reshape_alias",
    "select", "slice", "squeeze", "t", "to", "transpose", "unsqueeze", "unbind", "view",
    "view_as", "_unsafe_view",
    "dropout",  # of rate 0: its argument
}  # fmt: skip


def operators(backend: str, train: bool = True, channels_last: bool = False, **options: object) -> set[str]:
    """PyTorch's own ops in a forward, and in training a backward, as its profiler sees them."""
    model = vit.create("vit_small_patch16_224", backend=backend, depth=2, **options).train(train)
    x, gradient = draw.randn(2, 3, 224, 224), draw.randn(2, 1000)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.set_grad_enabled(train):
            y = model(x)
        if train:
            y.backward(gradient)

    step()
    model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return {e.name.removeprefix("aten::") for e in profile.events() if e.name.startswith("aten::")}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"channels_last": True}], ids=str)
def test_nothing_of_pytorch_runs_in_parallel_beside_our_threads(moving, train, options):
    assert operators(moving, train, **options) <= VIEWS


def test_the_profiler_sees_what_would_run_in_parallel():
    assert {"cat", "add", "sum", "copy_"} <= operators("reference")


def same_movement(backend: str, dtype: torch.dtype) -> None:
    """Every function gives PyTorch's bits."""
    for got, want in zip(moved(of(backend), dtype), moved(of("reference"), dtype), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_movement_gives_the_bits_of_pytorch(moving, dtype):
    same_movement(moving, dtype)


def moved(movement: Movement, dtype: torch.dtype) -> list[torch.Tensor]:
    """Results and gradients of every function but the mean; sums are of two terms, in any order the same."""
    draw.restart()
    image, patches, prefix, position, y = (
        draw.randn(size).to(dtype).requires_grad_()
        for size in [(2, 3, 6, 4, 10), (2, 5, 37), (1, 2, 37), (1, 7, 37), (2, 7, 37)]
    )
    cut = movement.contiguous(image.permute(0, 2, 3, 1, 4))
    first, second = movement.fork(y * 2)
    results = [
        cut,
        movement.contiguous(image.permute(0, 4, 3, 1, 2)),
        movement.tokens(patches, prefix, position),
        movement.tokens(patches, None, position[:, 2:]),
        movement.tokens(patches, prefix, None),
        movement.first(y * 3, 1),
        movement.first(y * 5, 4),
        (first * first.detach() + second).sum(1),
    ]
    leaves = [image, patches, prefix, position, y]
    gradients = [g for r in results for g in torch.autograd.grad(r, leaves, draw.randn_like(r), allow_unused=True)]
    return [r.detach() for r in results] + [g for g in gradients if g is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("terms", [1, 15, 16, 17, 32, 196, 1000])
def test_sums_in_blocks(moving, terms, dtype):
    """A sum passes at most 16 additions within its block, one for each block and one more, each of half an eps of the
    accumulator; the result is rounded once, a mean divided before."""
    x = draw.randn(terms, 3, 37).to(dtype)
    truth, size = x.double().sum(0), x.double().abs().sum(0)
    acc = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = (16 + terms // 16 + 2) * acc / 2 * size + torch.finfo(dtype).eps * truth.abs()
    total = move(NATIVE[moving], (3, 37), x[0], terms=terms, term=3 * 37).double()
    mean = move(NATIVE[moving], (3, 37), x[0], terms=terms, term=3 * 37, divisor=terms).double()
    assert ((total - truth).abs() <= bound).all()
    assert ((mean * terms - truth).abs() <= bound + acc * truth.abs()).all()


@pytest.mark.parametrize("skip", [0, 1, 5])
def test_the_mean_and_its_gradient(moving, skip):
    tokens = draw.randn(3, 9, 40)
    found = []
    for movement in (of(moving), of("reference")):
        x = tokens.clone().requires_grad_()
        y = movement.mean(x, skip)
        found.append((y, *torch.autograd.grad(y, x, torch.arange(120.0).view(3, 40))))
    (y, dx), (want, want_dx) = found
    torch.testing.assert_close(y, want, rtol=0, atol=2**-20)  # 9 values below 4
    assert dx.equal(want_dx)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_move_by_the_formula(moving, threads):
    """Any strides, also of the last dimension and zero, of one to six dimensions."""
    torch.set_num_threads(threads)
    for _ in range(60):
        dims = int(draw.randint(1, 7, ()))
        size = [int(n) for n in draw.randint(1, 9, (dims,))]
        size[-1] *= int(draw.randint(1, 20, ()))
        a, b = draw.randn(size), draw.randn([*size[:-1], 1]).expand(size)
        order = [int(n) for n in draw.randperm(dims)]
        a = a.permute(order).contiguous().permute([order.index(i) for i in range(dims)])
        assert move(NATIVE[moving], size, a).equal(a)
        assert move(NATIVE[moving], size, a, b=b).equal(a + b)
        if dims > 2:
            leads = int(draw.randint(1, 4, ()))
            lead = draw.randn(size[0], leads, *size[2:])
            shape = [size[0], leads + size[1], *size[2:]]
            assert move(NATIVE[moving], shape, a, lead, leads=leads).equal(torch.cat([lead, a], 1))
            assert move(NATIVE[moving], shape, a, leads=leads).equal(torch.cat([torch.zeros_like(lead), a], 1))


def test_movement_outlives_copies_of_a_model(moving):
    model = copy.deepcopy(vit.create("vit_digits", backend=moving))
    assert model.ops.movement is not of("reference")
    assert isinstance(pickle.loads(pickle.dumps(model)).ops.movement, KernelMovement)


# ----- fork

FORK = """
import os, signal, sys
import torch, vit
torch.set_num_threads(2)
backend, what = sys.argv[1:]
images = torch.linspace(-2, 2, 4 * 3 * 224 * 224).sin().view(4, 3, 224, 224)

def small(**options):
    return vit.create("vit_tiny_patch16_224", backend=backend, depth=2, **options)

def step(model, optimizer=None):
    loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([1, 2, 3, 4]))
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return loss

def ops():
    x = images[:, 0, :197, :192].clone().requires_grad_()
    y = vit.ops.layer_norm(x.transpose(0, 1), backend=backend)
    y = vit.ops.linear(y, images[0, 0].repeat(3, 1)[:576, :192], activation="gelu", backend=backend)
    y = vit.ops.attention(y.reshape(197, 4, 3, 3, 64), backend=backend)
    y = vit.ops.gelu(y, backend=backend).flatten(2)
    y = vit.ops.matmul(y, images[0, 1].repeat(1, 2)[:192, :300], backend=backend)
    y.backward(torch.ones(()).expand(y.shape))

def engine():
    built = vit.Engine(small(), num_threads=2)
    return lambda: built(images)

model = small(**({"global_pool": "avg"} if what == "avg" else {"drop_path_rate": 0.1} if what == "drop" else {}))
optimizer = torch.optim.AdamW(model.parameters())
work = {
    "eval": lambda: model.eval()(images).sum(),
    "no_grad": torch.no_grad()(lambda: model.eval()(images)),
    "channels_last": torch.no_grad()(lambda: model.eval()(images.to(memory_format=torch.channels_last))),
    "train": lambda: step(model),
    "avg": lambda: step(model),
    "drop": lambda: step(model),
    "optimizer": lambda: step(model, optimizer),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16)(step)(model),
    "ops": ops,
    "engine": engine() if what == "engine" else None,
}[what]
work()
for generation in range(2):  # a child, and a child of a child
    child = os.fork()
    if child:
        break
    signal.alarm(60)
    work()
if child:
    status = os.waitpid(child, 0)[1]
    if generation == 0:
        work()  # the parent's threads are as they were
        assert torch.get_num_threads() == 2
    os._exit(0 if status == 0 else 1)
os._exit(0)
"""

WORK = ["eval", "no_grad", "channels_last", "train", "avg", "drop", "optimizer", "autocast", "ops", "engine"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("what", WORK)
def test_a_forked_child_computes(host, what):
    """OpenMP's threads stay with the parent: a parallel region in the child would wait for them for ever."""
    if what == "engine" and host != "cpu":
        pytest.skip("the engine is the cpu backend's")
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", FORK, host, what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr or "the child did not return within a minute"
