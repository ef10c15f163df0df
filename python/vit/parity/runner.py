"""Runs one case on one backend and holds its output and gradients to the truth."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import ops
from .case import Case
from .problems import DEFINITIONS, Ops, Problem, Tensors, build, out_dtype, torch_dtype
from .tf32 import RoundedProducts
from .tolerance import Comparison, compare


@dataclasses.dataclass(frozen=True)
class Result:
    """The verdict on a case: `error` and `bound` of its worst tensor; `text`: what failed or was refused."""

    case: Case
    error: float
    bound: float
    ok: bool
    skipped: bool = False
    text: str = ""

    @property
    def ratio(self) -> float:
        """error / bound, above 1 for a failure."""
        return self.error / self.bound if self.bound else (0.0 if self.ok else math.inf)

    def record(self) -> dict[str, Any]:
        """The entry of `vit parity --json`; an error that is no number (wrong NaN, wrong shape) is null."""
        case = self.case
        record: dict[str, Any] = {
            "id": case.id,
            "op": case.op,
            "dtype": case.precision,
            "direction": case.direction,
        }
        error = self.error if math.isfinite(self.error) else None
        record |= {"error": error, "bound": self.bound, "ok": self.ok, "group": case.group}
        if self.text:
            record["skipped" if self.skipped else "text"] = self.text
        return record


def backend_ops(name: str) -> Ops:
    """The public ops, all on one backend."""
    return SimpleNamespace(**{op: functools.partial(getattr(ops, op), backend=name) for op in DEFINITIONS})


def run(case: Case, ops: Ops, device: str | torch.device = "cpu", plain: bool = False) -> Result:
    """Compares one call of `ops` with the truth: its output, in direction "bwd" also every gradient.

    plain: the ops are PyTorch's own, and what those get wrong (their float32 GELU of infinity can be NaN) is no
    failure of vit: a case whose every result is, bit for bit, that of PyTorch's op is then skipped and says so.
    """
    from ..backends import BackendError

    problem = build(case, device)
    try:
        with _allow_tf32(case.tf32):
            got = call(problem, lambda t: DEFINITIONS[case.op].call(ops, case, t))
    except BackendError as refusal:
        return Result(case, 0.0, 0.0, ok=False, skipped=True, text=str(refusal))
    worst = max(compare_all(problem, got), key=lambda c: (not c.ok, c.ratio))
    if plain and not worst.ok and _same(got, call(problem, lambda t: DEFINITIONS[case.op].torch(case, t))):
        text = f"{case.id}\nPyTorch's own op gives this, too: {worst.text}"
        return Result(case, worst.error, worst.bound, ok=False, skipped=True, text=text)
    return Result(case, worst.error, worst.bound, worst.ok, text=f"{case.id}\n{worst.text}" if worst.text else "")


def compare_all(problem: Problem, got: Tensors) -> list[Comparison]:
    """Every tensor of a result against the truth."""
    case, definition = problem.case, DEFINITIONS[problem.case.op]
    exact = _double(problem)
    with sdpa_kernel(SDPBackend.MATH):  # the others keep only the log-sum-exp, which is not exact enough
        truth = call(exact, lambda t: definition.call(backend_ops("reference"), case, t))
    baseline: Tensors = {}
    if case.dtype != "float64":
        with _torch_in_tf32(problem.dy.device) if case.tf32 else contextlib.nullcontext():
            baseline = call(problem, lambda t: definition.torch(case, t))
    magnitude = definition.magnitude(case, exact.tensors, exact.dy)
    return [
        compare(
            name if name == "out" else f"gradient of {name}",
            result,
            truth[name],
            baseline.get(name),
            magnitude[name].broadcast_to(truth[name].shape),
            dtype=out_dtype(case) if name == "out" else problem.tensors[name].dtype,
            compute_dtype=torch_dtype(case.dtype),
            tf32=case.tf32,
        )
        for name, result in got.items()
    ]


def call(problem: Problem, f: Any) -> Tensors:
    """f(tensors) as "out", and in the backward direction the gradient of every tensor under its name."""
    if problem.case.direction == "fwd":
        with torch.no_grad():
            return {"out": f(problem.tensors)}
    leaves = {name: x.detach().requires_grad_() for name, x in problem.tensors.items()}
    out: Tensor = f(leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), problem.dy.to(out.dtype), allow_unused=True)
    missing = [name for name, grad in zip(leaves, grads, strict=True) if grad is None]
    if missing:
        raise AssertionError(f"{problem.case.id}: no gradient reaches {', '.join(missing)}")
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def _same(a: Tensors, b: Tensors) -> bool:
    """Whether all tensors are equal, NaN where the other has NaN."""
    return all(torch.allclose(a[name], b[name], rtol=0.0, atol=0.0, equal_nan=True) for name in a)


@contextlib.contextmanager
def _torch_in_tf32(device: torch.device) -> Iterator[None]:
    """PyTorch's ops take their products in TF32: every one, by rounding the factors; a GPU multiplies in TF32, too."""
    with _allow_tf32(device.type == "cuda"), sdpa_kernel(SDPBackend.MATH), RoundedProducts():
        yield


@contextlib.contextmanager
def _allow_tf32(allowed: bool) -> Iterator[None]:
    """What users set: whether products of float32 may be in TF32, by those switches that this process uses."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # after a use of the switches that are new in torch 2.9
        matmul: Any = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if allowed else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
        return
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _double(problem: Problem) -> Problem:
    """The same numbers in float64 on the CPU, contiguous."""
    tensors = {name: x.to("cpu", torch.float64).contiguous() for name, x in problem.tensors.items()}
    return Problem(problem.case, tensors, problem.dy.to("cpu", torch.float64))
