"""The case list on every path, the promises of the backend, and the sanitizers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from vit.parity import backend_ops, cases, run

from . import timing
from .report import Report
from .timing import PATHS, normal, path

ROOT = Path(__file__).parents[2]


def part_parity(report: Report, every: int, first: int) -> None:
    for check in (deterministic, batch_invariant, same_in_a_graph, on_another_stream, on_every_device):
        if every == 1 and first == 0 and report.wanted(check.__name__):
            problem = check()
            report.fail(check.__name__, problem) if problem else report.add(check.__name__, ok=True)
    ops = backend_ops(timing.BACKEND)
    for label in labels():
        products = ("matmul", "linear", "attention") if label == "portable" else ("attention",)
        wanted = [c for c in cases("cuda") if label == "automatic" or c.op in products][first::every]
        passed = failed = skipped = 0
        worst = 0.0
        with path(label):
            for i, case in enumerate(wanted):
                if time.monotonic() > report.end:
                    report.add(
                        f"parity {label} rest",
                        not_run=f"{len(wanted) - i} cases, out of time: --first {first + i * every}",
                    )
                    break
                if report.only and not report.only.search(case.id):
                    continue
                try:
                    result = run(case, ops, timing.DEVICE)
                except Exception as error:
                    report.fail(f"{label} {case.id}", f"{type(error).__name__}: {str(error)[:300]}")
                    failed += 1
                    if "CUDA error" in str(error):  # the context is gone: no later figure would mean anything
                        raise
                    continue
                skipped += result.skipped
                passed += result.ok
                worst = max(worst, result.ratio if result.ok else 0.0)
                if not result.ok and not result.skipped:
                    failed += 1
                    report.fail(f"{label} {case.id}", result.text[:300])
        report.add(f"parity {label}", passed=passed, failed_cases=failed, skipped=skipped, worst_ratio=worst)


def labels() -> list[str]:
    """The paths to check. That of a kernel which no GPU has run yet is checked by itself, where it is chosen."""
    alone, chosen = "wgmma_backward", timing.chosen()
    if chosen == alone:
        return [alone]
    return [label for label in PATHS if label not in ("automatic", alone) or label == chosen]


def block(x: Tensor, weights: list[Tensor]) -> Tensor:
    """One transformer block on the CUDA ops: what the checks below run."""
    ops, (g, b, wqkv, wproj, w1, w2) = backend_ops(timing.BACKEND), weights
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
    gradients = []

    def backward() -> Tensor:
        return torch.autograd.grad(block(x, weights).sum(), x)[0]

    graph = timing.capture(lambda: gradients.append(backward()), backward)
    with torch.no_grad():
        x.copy_(normal(*x.shape))
    graph.replay()
    return "" if gradients[-1].equal(backward()) else "a replayed graph gives other bits than eager calls"


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


def part_sanitizer(report: Report) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return guard_bytes(report, "compute-sanitizer is not installed")
    for name in ("memcheck", "racecheck"):
        seconds = max(30.0, (report.end - time.monotonic()) / (2 if name == "memcheck" else 1))
        command = [tool, "--tool", name, "--error-exitcode", "7", sys.executable, "-m", "benchmarks.gpu"]
        command += ["--part", "parity", "--every", "40", "--path", timing.chosen()]
        command += ["--seconds", str(int(seconds * 0.8))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, cwd=ROOT)
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
    command = [sys.executable, "-m", "pytest", "-q", "tests/ops/test_memory.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    text = (done.stdout + done.stderr)[-1500:]
    if done.returncode == 0:
        report.add("guard bytes", ok=True, tail=text[-300:])
    else:
        report.fail("guard bytes", f"exit code {done.returncode}: {text}")
