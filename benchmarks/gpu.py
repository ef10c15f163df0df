"""Checks and measures the CUDA backend on the GPU of this machine: python benchmarks/gpu.py --part ops --out gpu.json

Parts, each within --seconds (default 450): what does not fit is listed as not run, and --only takes it up later.

    parity     the case list on the Hopper and on the portable path; determinism, batch invariance, graphs, streams
    ops        copy and matmul ceilings; linear, attention, layer_norm and gelu against PyTorch's own
    model      ViT inference, training and batch-1 latency against eager and torch.compile, all in bfloat16
    train      a short training on digits with --backend cuda and with cpu: the accuracies, side by side
    sanitizer  compute-sanitizer memcheck and racecheck over a sample of the case list

Candidates run in turn, round after round, on random data and on enough buffers to leave the L2 cache; a figure is
the median over rounds. Forwards of ops are timed as replays of a CUDA graph, which leaves out the time of their
launches. Every figure is in the file given to --out as soon as it is known; the file keeps the other parts it has.

From a checkout to figures, on a machine without a network and perhaps without git (python3 is the one that has torch;
2 cores build for a minute):

    VIT_BACKENDS=cpu,cuda python3 -m pip install --no-build-isolation --no-deps .
    python3 -m vit info
    python3 benchmarks/gpu.py --part parity --commit HASH --out benchmarks/results/h200/DATE.json
    python3 benchmarks/gpu.py --part ops    --commit HASH --out benchmarks/results/h200/DATE.json
    python3 benchmarks/gpu.py --part model  --commit HASH --out ... --only ' B'    # then ' S', ' L', ' H'
    python3 benchmarks/gpu.py --part train  --commit HASH --out ...
    python3 benchmarks/gpu.py --part sanitizer --commit HASH --out ...

Where pip refuses (its setuptools must know SPDX licenses, 77 and newer), CMake alone will do, with PYTHONPATH=python:

    cmake -S . -B build/cuda -G Ninja -DVIT_BACKEND=cuda -DPython_EXECUTABLE=$(which python3)
    cmake --build build/cuda && cmake --install build/cuda --prefix python/vit
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import json
import math
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import vit
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from vit.backends import NativeBackend, get
from vit.testing import backend_ops, cases, run

#: The numbers of vit_cuda_set_path (csrc/cuda/runtime.cuh): which kernels may run.
AUTOMATIC, PORTABLE, NO_WGMMA = 0, 1, 2
BF16 = torch.bfloat16

#: Buffers in rotation take at least this much: four times the L2 cache of an H200.
ROTATION_BYTES = 240 << 20

#: Width, depth, heads, patch tokens with the class token, and a batch that fills a large GPU.
MODELS = {
    "S": ("vit_small_patch16_224", 384, 6, 197, 256),
    "B": ("vit_base_patch16_224", 768, 12, 197, 256),
    "L": ("vit_large_patch16_224", 1024, 16, 197, 128),
    "H": ("vit_huge_patch14_224", 1280, 16, 257, 64),
}

#: Candidates that are timed but not counted in "speedup": our other path, and a different function.
NO_RIVALS = ("portable", "torch_tanh_epilogue")

Candidate = Callable[[int], Any]


class Report:
    """The figures of one part, printed and kept as they come, and the clock that ends it."""

    def __init__(self, part: str, seconds: float, only: str | None, out: Path | None, environment: dict[str, Any]):
        self.end = time.monotonic() + seconds
        self.only = re.compile(only) if only else None
        self.failed = False
        self.out = out
        self.content: dict[str, Any] = json.loads(out.read_text()) if out and out.exists() else {}
        rows = self.content.get(part, {}).get("results", []) if only else []  # what the pattern takes up comes on top
        self.record: dict[str, Any] = {"environment": environment, "failed": False, "results": rows}
        self.content[part] = self.record

    def wanted(self, name: str) -> bool:
        """Whether to run `name`: it matches --only, and there is time."""
        if self.only and not self.only.search(name):
            return False
        if time.monotonic() > self.end:
            self.add(name, not_run="out of time")
            return False
        return True

    def add(self, name: str, **figures: Any) -> None:
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items()}
        rows = self.record["results"]
        rows[:] = [row for row in rows if row["name"] != name or "failed" in row] + [{"name": name, **rounded}]
        self.record["failed"] = self.failed
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.content, indent=1) + "\n")
        print(f"{name:<46} " + "  ".join(f"{k}={v}" for k, v in rounded.items()), flush=True)

    def fail(self, name: str, text: str) -> None:
        self.failed = True
        self.add(name, failed=text)


@contextmanager
def path(which: int) -> Iterator[None]:
    """The kernels of one path, by the entry point of csrc/cuda/runtime.cu."""
    set_path = _library().vit_cuda_set_path
    set_path(which)
    try:
        yield
    finally:
        set_path(AUTOMATIC)


@functools.cache
def _library() -> ctypes.CDLL:
    record = get("cuda")
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
            print(f"  {name}: {_first_line(error)}", flush=True)
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
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            f(0)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for i in range(count):
                f(i)
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"  not captured, timed call by call: {_first_line(error)}", flush=True)
        torch.cuda.synchronize()
        return None
    return graph.replay, count


def _first_line(error: Exception) -> str:
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
    return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=grad)


# ---- parity ----


def part_parity(report: Report, every: int) -> None:
    for check in (deterministic, batch_invariant, same_in_a_graph, on_another_stream, on_every_device):
        if every == 1 and report.wanted(check.__name__):
            problem = check()
            report.fail(check.__name__, problem) if problem else report.add(check.__name__, ok=True)
    ops = backend_ops("cuda")
    for which, label in ((AUTOMATIC, "automatic"), (PORTABLE, "portable")):
        wanted = [c for c in cases("cuda") if which == AUTOMATIC or c.op in ("matmul", "linear", "attention")][::every]
        passed = failed = skipped = 0
        worst = 0.0
        with path(which):
            for i, case in enumerate(wanted):
                if time.monotonic() > report.end:
                    report.add(f"parity {label}", not_run=f"{len(wanted) - i} cases, out of time")
                    break
                if report.only and not report.only.search(case.id):
                    continue
                try:
                    result = run(case, ops, "cuda")
                except Exception as error:
                    report.fail(f"{label} {case.id}", f"{type(error).__name__}: {str(error)[:300]}")
                    failed += 1
                    if "CUDA error" in str(error) or "cuda " in str(
                        error
                    ):  # the context is gone: no later figure would mean anything
                        raise
                    continue
                skipped += result.skipped
                passed += result.ok
                worst = max(worst, result.ratio if result.ok else 0.0)
                if not result.ok and not result.skipped:
                    failed += 1
                    report.fail(f"{label} {case.id}", result.text[:300])
        report.add(f"parity {label}", passed=passed, failed_cases=failed, skipped=skipped, worst_ratio=worst)


def block(x: Tensor, weights: list[Tensor]) -> Tensor:
    """One transformer block on the CUDA ops: what the checks below run."""
    ops, (g, b, wqkv, wproj, w1, w2) = backend_ops("cuda"), weights
    q, k, v = ops.linear(ops.layer_norm(x, g, b), wqkv).unflatten(-1, (3, -1, 64)).unbind(2)
    x = ops.linear(ops.attention(q, k, v).flatten(2), wproj, residual=x)
    return ops.linear(ops.linear(ops.layer_norm(x, g, b), w1, activation="gelu"), w2, residual=x)


def block_weights(c: int = 384) -> list[Tensor]:
    shapes = ((c,), (c,), (3 * c, c), (c, c), (4 * c, c), (c, 4 * c))
    return [(normal(*s) / (s[-1] ** 0.5 if len(s) == 2 else 1)).requires_grad_() for s in shapes]


def deterministic() -> str:
    """Two runs, every gradient, bit for bit."""
    weights, x = block_weights(), normal(16, 197, 384)
    runs = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        runs.append(torch.autograd.grad(block(leaf, weights).float().square().sum(), [leaf, *weights]))
    different = [i for i, (a, b) in enumerate(zip(*runs, strict=True)) if not a.equal(b)]
    return f"gradients {different} differ between two runs" if different else ""


def batch_invariant() -> str:
    """An image alone gives the bits it gives in a batch."""
    weights, x = block_weights(), normal(64, 197, 384)
    with torch.no_grad():
        many = block(x, weights)
        wrong = [n for n in (1, 2, 7, 32) if not block(x[:n].clone(), weights).equal(many[:n])]
    return f"batches of {wrong} give other bits than 64" if wrong else ""


def same_in_a_graph() -> str:
    """Forward and backward captured and replayed on new data."""
    weights, x = block_weights(), normal(8, 197, 384, grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(block(x, weights).sum(), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = torch.autograd.grad(block(x, weights).sum(), x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    (eager,) = torch.autograd.grad(block(x, weights).sum(), x)
    return "" if captured.equal(eager) else "a replayed graph gives other bits than eager calls"


def on_another_stream() -> str:
    weights, x = block_weights(), normal(8, 197, 384)
    with torch.no_grad():
        want = block(x, weights)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            got = block(x, weights)
        torch.cuda.synchronize()
    return "" if got.equal(want) else "another stream gives other bits"


def on_every_device() -> str:
    weights, x = block_weights(), normal(2, 197, 384)
    with torch.no_grad():
        want = block(x, weights)
        for index in range(1, torch.cuda.device_count()):
            got = block(x.to(index), [w.to(index) for w in weights])
            if not got.to(0).equal(want):
                return f"device {index} gives other bits than device 0"
    return "" if torch.cuda.current_device() == 0 else "the current device has changed"


# ---- ops ----


def part_ops(report: Report, every: int) -> None:
    copy_ceiling(report)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        matmul_ceiling(report, dtype)
    torch.set_float32_matmul_precision("high")
    matmul_ceiling(report, torch.float32, "-tf32")
    torch.set_float32_matmul_precision("highest")
    for c in (384, 768, 1024, 1280):
        layer_norm(report, c)
    for approximate in ("none", "tanh"):
        gelu(report, approximate)
    for size, (_, c, _, tokens, batch) in MODELS.items():
        m = tokens * batch
        product(report, f"linear {size} qkv", m, 3 * c, c)
        product(report, f"linear {size} proj", m, c, c, residual=True)
        product(report, f"linear {size} fc1", m, 4 * c, c, activation="gelu")
        product(report, f"linear {size} fc2", m, c, 4 * c, residual=True)
    for d in (64, 80):
        for n in (50, 197, 257, 577, 1025):
            attention(report, n, d)


def copy_ceiling(report: Report) -> None:
    if not report.wanted("copy"):
        return
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    ms = milliseconds({"copy": lambda i: b.copy_(a)})["copy"]
    report.add("copy 1 GiB", ms=ms, TB_s=2 * a.numel() / ms / 1e9)


def matmul_ceiling(report: Report, dtype: torch.dtype, mode: str = "", n: int = 8192) -> None:
    name = f"matmul {n} {str(dtype).removeprefix('torch.')}{mode}"
    if not report.wanted(name):
        return
    a, b = normal(n, n, dtype=dtype), normal(n, n, dtype=dtype)
    candidates: dict[str, Candidate] = {
        "ours": lambda i: vit.ops.matmul(a, b, backend="cuda"),
        "torch": lambda i: a @ b,
    }
    compare_times(report, name, candidates, flop=2 * n**3)


def compare_times(
    report: Report, name: str, candidates: dict[str, Candidate], flop: float = 0, moved: float = 0, **kwargs: Any
) -> None:
    """One row: milliseconds of every candidate, the rate of ours, and how much faster ours is than the best rival."""
    ms = milliseconds(candidates, **kwargs)
    figures: dict[str, Any] = {f"{key}_ms": value for key, value in ms.items()}
    ours, others = ms.get("ours"), [value for key, value in ms.items() if key not in ("ours", *NO_RIVALS)]
    if ours and flop:
        figures["TF_s"] = flop / ours / 1e9
    if ours and moved:
        figures["TB_s"] = moved / ours / 1e9
    if ours and others:
        figures["speedup"] = min(others) / ours
    if not ours:
        report.failed = True
    report.add(name, **figures)


def portable(f: Candidate) -> Candidate:
    def call(i: int) -> Any:
        with path(PORTABLE):
            return f(i)

    return call


def layer_norm(report: Report, c: int) -> None:
    m = (64 << 20) // c  # 128 MiB of bfloat16
    name = f"layer_norm {m}x{c}"
    if not report.wanted(name):
        return
    weight, bias = normal(c, grad=True), normal(c, grad=True)
    x, dy = normal(m, c, grad=True), normal(m, c)
    functions: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: vit.ops.layer_norm(x, weight, bias, backend="cuda"),
        "eager": lambda: F.layer_norm(x, (c,), weight, bias, 1e-6),
    }
    functions["compiled"] = torch.compile(functions["eager"], dynamic=False)
    compare_times(report, f"{name} fwd", forwards(functions), moved=4 * m * c)
    outputs = {key: f() for key, f in functions.items()}
    compare_times(report, f"{name} bwd", backwards(outputs, (x, weight, bias), dy), moved=6 * m * c, graphs=False)


def forwards(functions: dict[str, Callable[[], Tensor]]) -> dict[str, Candidate]:
    """Each function without autograd."""

    def one(f: Callable[[], Tensor]) -> Candidate:
        return lambda i: torch.no_grad()(f)()

    return {name: one(f) for name, f in functions.items()}


def backwards(outputs: dict[str, Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> dict[str, Candidate]:
    """The backward of each output, over and over: on the stream of its forward, so no CUDA graph can capture it."""

    def one(y: Tensor) -> Candidate:
        return lambda i: torch.autograd.grad(y, inputs, dy, retain_graph=True)

    return {name: one(y) for name, y in outputs.items()}


def gelu(report: Report, approximate: str) -> None:
    n = 64 << 20
    name = f"gelu {approximate} {n}"
    if not report.wanted(name):
        return
    x, dy = normal(n, grad=True), normal(n)
    functions: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: vit.ops.gelu(x, approximate, backend="cuda"),
        "eager": lambda: F.gelu(x, approximate=approximate),
    }
    functions["compiled"] = torch.compile(functions["eager"], dynamic=False)
    compare_times(report, f"{name} fwd", forwards(functions), moved=4 * n)
    outputs = {key: f() for key, f in functions.items()}
    compare_times(report, f"{name} bwd", backwards(outputs, (x,), dy), moved=6 * n, graphs=False)


def product(
    report: Report, name: str, m: int, n: int, k: int, activation: str | None = None, residual: bool = False
) -> None:
    """One layer: the product alone, with what follows it in the block, and its backward."""
    name = f"{name} {m}x{n}x{k}"
    if not report.wanted(name):
        return
    weight, bias = normal(n, k) / k**0.5, normal(n)
    sets = rotate(lambda: (normal(m, k), normal(m, n)))

    def ours(i: int, fused: bool = True) -> Tensor:
        x, r = sets[i % len(sets)]
        if not fused:
            return vit.ops.linear(x, weight, bias, backend="cuda")
        return vit.ops.linear(x, weight, bias, activation, r if residual else None, backend="cuda")

    def theirs(i: int, fused: bool = True) -> Tensor:
        x, r = sets[i % len(sets)]
        y = F.linear(x, weight, bias)
        if fused and activation:
            y = F.gelu(y)
        return y + r if fused and residual else y

    with torch.no_grad():
        plain: dict[str, Candidate] = {"ours": lambda i: ours(i, False), "torch": lambda i: theirs(i, False)}
        plain["portable"] = portable(plain["ours"])
        compare_times(report, f"{name} fwd plain", plain, flop=2 * m * n * k)
        if activation or residual:
            fused: dict[str, Candidate] = {"ours": ours, "torch": theirs}
            if activation:  # the tanh form, by the epilogue of cuBLASLt: another function, for the time alone
                turned = weight.t()
                fused["torch_tanh_epilogue"] = lambda i: torch._addmm_activation(
                    bias, sets[i % len(sets)][0], turned, use_gelu=True
                )
            compare_times(report, f"{name} fwd fused", fused, flop=2 * m * n * k)
    x, w, b = (t.clone().requires_grad_() for t in (sets[0][0], weight, bias))
    y = F.linear(x, w, b)
    outputs = {
        "ours": vit.ops.linear(x, w, b, activation=activation, backend="cuda"),
        "torch": F.gelu(y) if activation else y,
    }
    compare_times(report, f"{name} bwd", backwards(outputs, (x, w, b), sets[0][1]), flop=4 * m * n * k, graphs=False)


#: PyTorch's attention kernels; its math formula is no rival.
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def attention(report: Report, n: int, d: int) -> None:
    h = 12 if d == 64 else 16
    b = max(1, (256 * 197) // n)
    name = f"attention B={b} N={n} H={h} D={d}"
    if not report.wanted(name):
        return
    sets = rotate(lambda: (normal(b, n, 3, h, d),))
    flop = 4 * b * h * n * n * d

    def sdpa(qkv: Tensor, backend: SDPBackend) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def ours(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(2)
        return vit.ops.attention(q, k, v, backend="cuda")

    def theirs(backend: SDPBackend) -> Candidate:
        return lambda i: sdpa(sets[i % len(sets)][0], backend)

    with torch.no_grad():
        candidates: dict[str, Candidate] = {"ours": lambda i: ours(sets[i % len(sets)][0])}
        candidates |= {key: theirs(backend) for key, backend in SDPA.items()}
        candidates["portable"] = portable(candidates["ours"])
        compare_times(report, name + " fwd", candidates, flop=flop, moved=8 * b * n * h * d)
    qkv, dy = normal(b, n, 3, h, d, grad=True), normal(b, n, h, d)
    outputs = {"ours": ours(qkv)}
    for key, backend in SDPA.items():
        try:
            outputs[key] = sdpa(qkv, backend)
        except RuntimeError as error:
            print(f"  {key}: {str(error).splitlines()[0][:150]}", flush=True)
    compare_times(
        report, name + " bwd", backwards(outputs, (qkv,), dy), flop=2.5 * flop, moved=16 * b * n * h * d, graphs=False
    )


# ---- model ----


def part_model(report: Report, every: int) -> None:
    for size in ("B", "S", "L", "H"):
        for what in (inference, latency, training):
            if report.wanted(f"{what.__name__} {size}"):
                try:
                    what(report, size)
                except torch.OutOfMemoryError as error:
                    report.fail(f"{what.__name__} {size}", str(error)[:200])
                torch.cuda.empty_cache()
                torch._dynamo.reset()


def models(name: str, training: bool) -> dict[str, Any]:
    """The same weights on our kernels and on PyTorch's, eager and compiled."""
    reference = vit.create(name, backend="reference", device="cuda", dtype=BF16)
    ours = vit.create(name, backend="cuda", device="cuda", dtype=BF16)
    ours.load_state_dict(reference.state_dict())
    for model in (ours, reference):
        model.train(training)
    found: dict[str, Any] = {"ours": ours, "eager": reference, "compiled": torch.compile(reference, dynamic=False)}
    if "base" in name and not training:
        found["max_autotune"] = torch.compile(reference, dynamic=False, mode="max-autotune-no-cudagraphs")
    return found


def inference(report: Report, size: str) -> None:
    name, *_, batch = MODELS[size]
    images = [normal(batch, 3, 224, 224) for _ in range(4)]

    def forward(model: Any) -> Candidate:
        def call(i: int) -> Tensor:
            with torch.no_grad():
                return model(images[i % 4])

        return call

    candidates = {key: forward(model) for key, model in models(name, training=False).items()}
    per_second(report, f"inference {size} batch {batch}", candidates, batch)


def training(report: Report, size: str) -> None:
    name, *_, batch = MODELS[size]
    images = [normal(batch, 3, 224, 224) for _ in range(2)]
    labels = torch.randint(1000, (batch,), device="cuda")

    def step(model: Any) -> Candidate:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def call(i: int) -> None:
            F.cross_entropy(model(images[i % 2]).float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return call

    candidates = {key: step(model) for key, model in models(name, training=True).items()}
    per_second(report, f"training {size} batch {batch}", candidates, batch, rounds=3, target=500)


def per_second(report: Report, name: str, candidates: dict[str, Candidate], batch: int, **kwargs: Any) -> None:
    ms = milliseconds(candidates, **({"rounds": 5, "target": 300, "graphs": False} | kwargs))
    figures: dict[str, Any] = {f"{key}_images_s": 1000 * batch / value for key, value in ms.items()}
    others = [value for key, value in ms.items() if key != "ours"]
    if "ours" in ms and others:
        figures["speedup"] = min(others) / ms["ours"]
    report.failed |= "ours" not in ms
    report.add(name, **figures)


def latency(report: Report, size: str) -> None:
    """Batch 1, both sides replayed as a CUDA graph."""
    image = normal(1, 3, 224, 224)

    def captured(model: Any) -> Candidate:
        with torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    model(image)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(image)
        return lambda i: graph.replay()

    found = models(MODELS[size][0], training=False)
    found.pop("max_autotune", None)
    ms = milliseconds({key: captured(model) for key, model in found.items()}, graphs=False)
    report.failed |= "ours" not in ms
    report.add(f"latency {size} batch 1", **{f"{key}_ms": value for key, value in ms.items()})


# ---- train ----


def part_train(report: Report, every: int) -> None:
    """The digits of scikit-learn, the same options on both backends."""
    for backend in ("cuda", "cpu"):
        if not report.wanted(f"train {backend}"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "vit", "train", "--out", f"{folder}/run", "--backend", backend]
            done = subprocess.run(command, capture_output=True, text=True)
            text = (done.stdout + done.stderr).strip()
            if done.returncode == 0:
                report.add(f"train {backend}", ok=True, tail=text[-300:])
            else:
                report.fail(f"train {backend}", f"exit code {done.returncode}: {text[-1000:]}")


# ---- sanitizer ----


def part_sanitizer(report: Report, every: int) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return guard_bytes(report, "compute-sanitizer is not installed")
    for name in ("memcheck", "racecheck"):
        seconds = max(30.0, (report.end - time.monotonic()) / (2 if name == "memcheck" else 1))
        command = [tool, "--tool", name, "--error-exitcode", "7", sys.executable, __file__]
        command += ["--part", "parity", "--every", "40", "--seconds", str(int(seconds * 0.8))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
        except subprocess.TimeoutExpired:
            report.add(name, not_run=f"longer than {seconds:.0f} s")
            continue
        text = (done.stdout + done.stderr)[-1500:]
        if "Device not supported" in done.stdout + done.stderr:
            return guard_bytes(report, "compute-sanitizer refuses this device")
        if done.returncode == 0:
            report.add(name, ok=True, tail=text[-300:])
        else:
            report.fail(name, f"exit code {done.returncode}: {text}")


def guard_bytes(report: Report, why: str) -> None:
    """In place of the tool: the tests that put guard bytes around every allocation."""
    report.add("compute-sanitizer", not_run=why)
    tests = Path(__file__).parent.parent / "tests" / "test_memory.py"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", str(tests)], capture_output=True, text=True)
    text = (done.stdout + done.stderr)[-1500:]
    if done.returncode == 0:
        report.add("guard bytes", ok=True, tail=text[-300:])
    else:
        report.fail("guard bytes", f"exit code {done.returncode}: {text}")


PARTS = {
    "parity": part_parity,
    "ops": part_ops,
    "model": part_model,
    "train": part_train,
    "sanitizer": part_sanitizer,
}


def head() -> str:
    """The commit that is checked out, "unknown" without git."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return "unknown"


def environment(commit: str | None) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or head() or "unknown",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "vit": vit.backends()["cuda"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), required=True)
    parser.add_argument("--out", type=Path, help="JSON file that gets the figures of the part")
    parser.add_argument("--seconds", type=float, default=450, help="when to stop (default: %(default)s)")
    parser.add_argument("--only", metavar="REGEX", help="only what matches")
    parser.add_argument("--commit", help="what is measured, where git cannot say (default: git rev-parse HEAD)")
    parser.add_argument("--every", type=int, default=1, help="parity: every n-th case (default: %(default)s)")
    args = parser.parse_args()
    if why := get("cuda").unavailable():
        print(f"gpu.py: backend 'cuda' cannot be used: {why}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    report = Report(args.part, args.seconds, args.only, args.out, environment(args.commit))
    PARTS[args.part](report, args.every)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
