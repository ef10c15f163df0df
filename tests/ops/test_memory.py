"""Kernels write what they own and read what they were given: guard bytes, misaligned views, 64-bit offsets."""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import pickle
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import draw
import pytest
import torch
import vit
from conftest import NATIVE
from test_ops import call, small
from torch import Tensor
from vit.ops import OPS, repeat
from vit.ops.bound import bind
from vit.parity import Case, backend_ops, cases
from vit.parity.problems import DEFINITIONS, build
from vit.parity.runner import call as run_problem

GUARD = 192  # bytes on either side of an allocation
PATTERN = 0xA5


class Guards:
    """Stands in for torch's allocations: each tensor lies between guard bytes and starts as NaN (bytes 0xFF)."""

    def __init__(self, shift: int) -> None:
        self.shift = shift  # elements by which tensors miss the alignment that torch would give them
        self.buffers: list[tuple[Tensor, int, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        before = GUARD + self.shift * dtype.itemsize
        size = math.prod(shape) * dtype.itemsize
        buffer = _EMPTY(before + size + GUARD, dtype=torch.uint8, device=device)
        buffer.fill_(PATTERN)
        inside = buffer[before : before + size]
        inside.fill_(0xFF)
        self.buffers.append((buffer, before, size))
        return inside.view(dtype).view(shape)

    def check(self, what: str) -> None:
        assert self.buffers, "the kernels allocated past the guards"
        for buffer, before, size in self.buffers:
            outside = torch.cat([buffer[:before], buffer[before + size :]])
            assert (outside == PATTERN).all(), f"{what}: wrote outside a tensor of {size} bytes"


_EMPTY = torch.empty


@contextlib.contextmanager
def guards(record, shift: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    found = Guards(shift)

    def empty(*shape, dtype=None, device=None, **_):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return found.empty(tuple(shape), dtype or torch.float32, device)

    def new_empty(x, *shape, dtype=None, device=None, **_):
        return empty(*shape, dtype=dtype or x.dtype, device=device or x.device)

    def empty_like(x, dtype=None, **_):
        return found.empty(tuple(x.shape), dtype or x.dtype, x.device)

    def workspace(nbytes, device):
        aligned = found.shift
        found.shift = 0
        memory = found.empty((nbytes + 64,), torch.uint8, device)
        found.shift = aligned
        skip = -memory.data_ptr() % 64
        found.buffers[-1] = (found.buffers[-1][0], GUARD + skip, nbytes)
        found.buffers[-1][0][: GUARD + skip].fill_(PATTERN)
        found.buffers[-1][0][GUARD + skip + nbytes :].fill_(PATTERN)
        return memory[skip : skip + nbytes]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        patch.setattr(record, "workspace", workspace, raising=False)
        for op in OPS.values():  # every call by its launcher, whose allocations these are
            patch.setitem(bind(op, record.name).__dict__, "repeats", (repeat._never, repeat._nothing))
        yield found


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("op", DEFINITIONS)
def test_nothing_is_written_outside_and_everything_inside(backend, device, op, shift, monkeypatch):
    """Outputs, statistics and workspace between guard bytes; results bit-equal to those in ordinary memory."""
    record = NATIVE[backend]
    for case in cases(device.type, ops=[op], groups=["odd", "corner"]):
        problem = build(case, device)
        definition = DEFINITIONS[op]
        want = run_problem(problem, lambda t: definition.call(backend_ops(backend), case, t))  # noqa: B023
        with guards(record, shift, monkeypatch) as found:
            got = run_problem(problem, lambda t: definition.call(backend_ops(backend), case, t))  # noqa: B023
        found.check(case.id)
        for name, x in want.items():
            assert same_bits(got[name], x), f"{case.id}: {name} differs in other memory"


def test_the_guards_would_notice(monkeypatch):
    """One byte beyond the end is found, in front of the beginning too."""
    for at in (-1, 12):
        found = Guards(0)
        x = found.empty((3,), torch.float32, "cpu")
        torch.as_strided(x.view(torch.uint8), (1,), (1,), x.storage_offset() * 4 + at).fill_(1)
        with pytest.raises(AssertionError, match="wrote outside a tensor of 12 bytes"):
            found.check("case")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_sliding_views_give_the_same_bits(backend, device, op, dtype):
    """Every input at 0 to 17 elements into a buffer: no kernel may want more alignment than an element's."""
    tensors, options = small(op, dtype, device)
    want = call(op, backend, tensors, options)
    for shift in range(1, 18):
        moved = {}
        for name, x in tensors.items():
            buffer = torch.full((x.numel() + shift + 1,), math.nan, dtype=dtype, device=device)
            moved[name] = buffer[shift : shift + x.numel()].view(x.shape).copy_(x).requires_grad_()
        y = call(op, backend, moved, options)
        assert y.detach().equal(want), shift
        grads = torch.autograd.grad(y, list(moved.values()), torch.ones_like(y))
        assert not any(g.isnan().any() for g in grads), shift


def far_apart(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose elements lie gigabytes apart, over memory that is reserved but never touched in between."""
    size = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    noreserve = 0x4000  # MAP_NORESERVE; the mmap module names it from Python 3.13 on
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve)
    return torch.as_strided(torch.frombuffer(memory, dtype=dtype), shape, strides)


FAR = 2**30 + 8  # elements: the third of four rows begins above 2^31

#: Op -> names of the tensors laid out far apart, and their strides.
FAR_CASES = [
    ("layer_norm", {"x": ((4, 40), (FAR, 1))}, {"weight": (40,), "bias": (40,)}),
    ("matmul", {"a": ((4, 24), (FAR, 1))}, {"b": (24, 9)}),
    ("matmul", {"a": ((24, 4), (1, FAR))}, {"b": (4, 9)}),
    ("matmul", {"b": ((4, 24), (FAR, 1))}, {"a": (7, 4)}),
    ("matmul", {"b": ((4, 7, 5), (FAR, 5, 1)), "a": ((4, 3, 7), (FAR, 7, 1))}, {}),
    ("linear", {"x": ((4, 24), (FAR, 1))}, {"weight": (9, 24), "bias": (9,), "residual": (4, 9)}),
    ("linear", {"weight": ((4, 24), (FAR, 1))}, {"x": (7, 24)}),
    ("attention", dict.fromkeys("qkv", ((1, 4, 2, 16), (4 * FAR, FAR, 16, 1))), {}),
    ("attention", dict.fromkeys("qkv", ((4, 5, 2, 16), (FAR, 32, 16, 1))), {}),
    ("attention", dict.fromkeys("qkv", ((1, 5, 4, 16), (4 * FAR, 16, FAR, 1))), {}),
]


@pytest.mark.parametrize(
    ("op", "far", "near"), FAR_CASES, ids=[f"{op}-{'-'.join(far)}-{i}" for i, (op, far, _) in enumerate(FAR_CASES)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_above_2_to_the_31(backend, device, op, far, near, dtype):
    if device.type != "cpu":
        pytest.skip("untouched virtual memory is the CPU's")
    tensors = {name: draw.randn(shape).to(dtype) for name, shape in near.items()}
    spread = dict(tensors)
    for name, (shape, strides) in far.items():
        tensors[name] = draw.randn(shape).to(dtype)
        spread[name] = far_apart(shape, strides, dtype).copy_(tensors[name])
    results = []
    for inputs in (tensors, spread):
        leaves = {name: inputs[name].detach().requires_grad_() for name in tensors}
        y = getattr(vit.ops, op)(**leaves, backend=backend)
        dy = torch.ones_like(y)
        results.append([y, *torch.autograd.grad(y, [leaves[name] for name in tensors], dy)])
    for a, b in zip(*results, strict=True):
        assert a.equal(b)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal with NaN equal to NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def test_no_case_is_left_out_of_the_guards():
    groups = {case.group for case in cases()}
    assert groups == {"regular", "odd", "corner", "large"}
    assert all(isinstance(case, Case) for case in cases(groups=["odd", "corner"]))


# ---- where large results of the CPU live ----


def total_faults(steps: int, backend: str) -> int:
    x, w = draw.randn(2048, 512), draw.randn(2048, 512)  # results of 16 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        vit.ops.gelu(vit.ops.linear(x, w, backend=backend), backend=backend)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture
def host_memory(backend):
    if not hasattr(NATIVE[backend], "memory") or sys.platform != "linux":
        pytest.skip("memory of results on the CPU, on Linux")
    memory = NATIVE[backend].memory
    memory.release()
    return memory


def test_large_results_get_the_pages_of_those_before(host_memory, backend):
    total_faults(1, backend)
    assert total_faults(10, backend) < 4096  # 320 MB: 81 920 pages
    assert host_memory.free_bytes() == 2 * 16 << 20
    host_memory.release()
    assert host_memory.free_bytes() == 0


def test_free_pages_and_blocks_are_never_more_than_blocks_once_were(host_memory):
    def kept() -> int:
        return sum(r.nbytes for r in host_memory.regions) - sum(s for s, _, _ in host_memory._extents(pages=False))

    alive = kept()  # of other tests
    random, blocks, live, most = Random(0), [], 0, 0
    for _ in range(400):
        if blocks and random.random() < 0.5:
            live -= blocks.pop(random.randrange(len(blocks))).nbytes
        else:
            blocks.append(host_memory.empty((random.randint(256, 4096), 1024), torch.float32))
            live += blocks[-1].nbytes
        most = max(most, live)
        assert kept() - alive <= most
    addresses = sorted((b.data_ptr(), b.data_ptr() + b.nbytes) for b in blocks)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(addresses))
    blocks.clear()
    assert host_memory.free_bytes() == kept() - alive <= most


def test_a_large_result_outlives_what_made_it(host_memory, backend):
    y = vit.ops.gelu(draw.randn(1024, 1024), backend=backend)
    want, half = y.clone(), y[512:]
    again = torch.empty_like(y).copy_(y)
    del y
    others = [vit.ops.gelu(torch.zeros(1024, 1024), backend=backend) for _ in range(3)]
    assert half.equal(want[512:])
    assert again.equal(want)
    assert not any(other.any() for other in others)


def test_large_results_may_be_written_in_place(host_memory, backend):
    """They are tensors like any other: not views, saved, shared and moved to other processes."""
    x = draw.randn(600, 512, requires_grad=True)
    y = vit.ops.linear(x, torch.ones(1024, 512), backend=backend)
    y += 1
    y.relu_().sum().backward()
    assert x.grad.shape == x.shape
    want = y.detach().clone()
    assert pickle.loads(pickle.dumps(y.detach())).equal(want)
    assert y.detach().share_memory_().equal(want)


def test_large_results_from_many_threads(host_memory, backend):
    def work(i: int) -> bool:
        x = torch.full((512, 1024), float(i))
        return all(vit.ops.matmul(x, torch.eye(1024), backend=backend).equal(x) for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
