"""Ceilings of the GPU, and every op against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import vit
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import timing
from .models import MODELS
from .report import Report
from .timing import Candidate, first_line, milliseconds, normal, path, rotate

#: Of the ceilings, and of the ops that memory bounds: 128 MiB of bfloat16.
CEILING, ELEMENTS = 8192, 64 << 20

#: Widths of layer_norm; tokens of attention, with as many of them in all as IMAGES of 197 have.
WIDTHS = (384, 768, 1024, 1280)
TOKENS = (50, 197, 257, 577, 1025)
IMAGES = 256

#: Candidates that are timed but not counted in "speedup": our other paths, and a different function.
NO_RIVALS = ("portable", "no_wgmma", "wgmma_backward", "torch_tanh_epilogue")


def part_ops(report: Report) -> None:
    copy_ceiling(report)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        matmul_ceiling(report, dtype)
    torch.set_float32_matmul_precision("high")
    matmul_ceiling(report, torch.float32, "-tf32")
    torch.set_float32_matmul_precision("highest")
    for c in WIDTHS:
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
        for n in TOKENS:
            attention(report, n, d)


def copy_ceiling(report: Report) -> None:
    if not report.wanted("copy"):
        return
    a = torch.empty(16 * ELEMENTS, dtype=torch.uint8, device=timing.DEVICE).random_()
    b = torch.empty_like(a)
    ms = milliseconds({"copy": lambda i: b.copy_(a)})["copy"]
    report.add("copy 1 GiB", ms=ms, TB_s=2 * a.numel() / ms / 1e9)


def matmul_ceiling(report: Report, dtype: torch.dtype, mode: str = "") -> None:
    n = CEILING
    name = f"matmul {n} {str(dtype).removeprefix('torch.')}{mode}"
    if not report.wanted(name):
        return
    a, b = normal(n, n, dtype=dtype), normal(n, n, dtype=dtype)
    candidates: dict[str, Candidate] = {
        "ours": lambda i: vit.ops.matmul(a, b, backend=timing.BACKEND),
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


def on_path(name: str, f: Candidate) -> Candidate:
    def call(i: int) -> Any:
        with path(name):
            return f(i)

    return call


def layer_norm(report: Report, c: int) -> None:
    m = ELEMENTS // c
    name = f"layer_norm {m}x{c}"
    if not report.wanted(name):
        return
    weight, bias = normal(c, grad=True), normal(c, grad=True)
    x, dy = normal(m, c, grad=True), normal(m, c)
    functions: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: vit.ops.layer_norm(x, weight, bias, backend=timing.BACKEND),
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
    n = ELEMENTS
    name = f"gelu {approximate} {n}"
    if not report.wanted(name):
        return
    x, dy = normal(n, grad=True), normal(n)
    functions: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: vit.ops.gelu(x, approximate, backend=timing.BACKEND),
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
            return vit.ops.linear(x, weight, bias, backend=timing.BACKEND)
        return vit.ops.linear(x, weight, bias, activation, r if residual else None, backend=timing.BACKEND)

    def theirs(i: int, fused: bool = True) -> Tensor:
        x, r = sets[i % len(sets)]
        y = F.linear(x, weight, bias)
        if fused and activation:
            y = F.gelu(y)
        return y + r if fused and residual else y

    with torch.no_grad():
        plain: dict[str, Candidate] = {"ours": lambda i: ours(i, False), "torch": lambda i: theirs(i, False)}
        plain["portable"] = on_path("portable", plain["ours"])
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
        "ours": vit.ops.linear(x, w, b, activation=activation, backend=timing.BACKEND),
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
    b = max(1, IMAGES * 197 // n)
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
        return vit.ops.attention(q, k, v, backend=timing.BACKEND)

    def theirs(backend: SDPBackend) -> Candidate:
        return lambda i: sdpa(sets[i % len(sets)][0], backend)

    qkv, dy = normal(b, n, 3, h, d, grad=True), normal(b, n, h, d)
    rates = {"flop": 2.5 * flop, "moved": 16 * b * n * h * d, "graphs": False}
    if timing.chosen() == "wgmma_backward":
        newest = backwards({"ours": ours(qkv)}, (qkv,), dy)["ours"]
        race = {"ours": on_path("automatic", newest), "wgmma_backward": newest}
        return compare_times(report, name + " bwd race", race, **rates)
    with torch.no_grad():
        candidates: dict[str, Candidate] = {"ours": lambda i: ours(sets[i % len(sets)][0])}
        candidates |= {key: theirs(backend) for key, backend in SDPA.items()}
        for name_of_path in ("portable", "no_wgmma"):
            candidates[name_of_path] = on_path(name_of_path, candidates["ours"])
        compare_times(report, name + " fwd", candidates, flop=flop, moved=8 * b * n * h * d)
    outputs = {"ours": ours(qkv)}
    for key, backend in SDPA.items():
        try:
            outputs[key] = sdpa(qkv, backend)
        except Exception as error:
            print(f"  {key}: {first_line(error)}", flush=True)
    compare_times(report, name + " bwd", backwards(outputs, (qkv,), dy), **rates)
