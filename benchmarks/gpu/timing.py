"""How candidates are timed on the GPU: in turn, by CUDA events, forwards as replays of a graph."""

from __future__ import annotations

import ctypes
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vit.backends import NativeBackend, get
from vit.support import random

#: What is measured. The tests of these files put a CPU here.
DEVICE, BACKEND = "cuda", "cuda"

#: The numbers of vit_cuda_set_path (csrc/cuda/runtime.cuh): which kernels may run.
PATHS = {"automatic": 0, "portable": 1, "no_wgmma": 2, "no_overlap": 3, "wgmma_backward": 4}

#: Buffers in rotation take at least this much: four times the L2 cache of an H200.
ROTATION_BYTES = 240 << 20

BF16 = torch.bfloat16

#: Random numbers before they come again: a prime, so that no two rows of a matrix are equal.
PERIOD = 1_048_573
_drawn = 0

Candidate = Callable[[int], Any]


_chosen = "automatic"


def choose(name: str) -> None:
    """From here on the kernels of one of PATHS, by the entry point of csrc/cuda/runtime.cu."""
    global _chosen
    _set_path(name)
    _chosen = name


@contextmanager
def path(name: str) -> Iterator[None]:
    """The kernels of one of PATHS for a while."""
    before = _chosen
    choose(name)
    try:
        yield
    finally:
        choose(before)


def chosen() -> str:
    return _chosen


def _set_path(name: str) -> None:
    _library().vit_cuda_set_path(PATHS[name])


@functools.cache
def _library() -> ctypes.CDLL:
    record = get(BACKEND)
    assert isinstance(record, NativeBackend)  # for the type checker
    return ctypes.CDLL(record.lib.__file__)


def milliseconds(
    candidates: dict[str, Candidate], rounds: int = 7, target: float = 20.0, graphs: bool = True
) -> dict[str, float]:
    """Median time per call of each candidate; one that raises is left out with a line of text.

    A candidate is called with a running number, to choose its buffers. Each round takes about `target` ms. With
    `graphs` the calls of a round are captured once and replayed; what cannot be captured is called.
    """
    rounds_of: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, f in candidates.items():
        try:
            for i in range(3):
                f(i)
            count = max(1, math.ceil(target / max(_timed(*_calls(f, 3)), 1e-3)))
            rounds_of[name] = (_replays(f, min(count, 256)) if graphs else None) or _calls(f, count)
        except Exception as error:
            print(f"  {name}: {first_line(error)}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in rounds_of}
    for _ in range(rounds):
        for name, (run_all, count) in rounds_of.items():
            times[name].append(_timed(run_all, count))
    return {name: statistics.median(t) for name, t in times.items()}


def _calls(f: Candidate, count: int) -> tuple[Callable[[], Any], int]:
    def run_all() -> None:
        for i in range(count):
            f(i)

    return run_all, count


def _replays(f: Candidate, count: int) -> tuple[Callable[[], Any], int] | None:
    """`count` calls as one graph, None where they cannot be captured."""
    try:
        graph = capture(lambda: [f(i) for i in range(count)], lambda: f(0))
        graph.replay()
    except Exception as error:
        print(f"  not captured, timed call by call: {first_line(error)}", flush=True)
        torch.cuda.synchronize()
        return None
    return graph.replay, count


def capture(work: Callable[[], Any], warm_up: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """`work` as a graph, after three rounds of `warm_up` on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            warm_up()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


def _timed(run_all: Callable[[], Any], count: int) -> float:
    """Milliseconds per call of something that makes `count` calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run_all()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count


def rotate(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """As many sets of buffers as it takes to leave the L2 cache, at most 64."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first)
    return [first, *(make() for _ in range(min(63, ROTATION_BYTES // max(size, 1))))]


def normal(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
    """N(0, 1): PERIOD numbers drawn on the CPU, over and over; a GPU's own numbers depend on how many cores it has."""
    global _drawn
    start, count = _drawn % PERIOD, math.prod(shape)
    _drawn += count
    numbers = _numbers().to(DEVICE, dtype).repeat(-(-(start + count) // PERIOD))
    return numbers[start : start + count].clone().view(shape).requires_grad_(grad)


@functools.cache
def _numbers() -> Tensor:
    return random.normal(PERIOD, "gpu benchmark")
