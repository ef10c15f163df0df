"""PyTorch's own sample inputs for the five ops, held to the same rule as the case list."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import draw
import pytest
import torch
from conftest import NATIVE
from torch import Tensor
from vit.parity import Case, backend_ops
from vit.parity.problems import DEFINITIONS, Problem, Tensors
from vit.parity.runner import call, compare_all

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of importing PyTorch's test suite
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo.core import OpInfo, SampleInput

#: Op -> PyTorch's name of it, and how many of its samples must at least lie within the contract.
NAMES = {
    "layer_norm": ("nn.functional.layer_norm", 3),
    "rms_norm": ("nn.functional.rms_norm", 3),
    "gelu": ("nn.functional.gelu", 6),
    "matmul": ("matmul", 8),
    "linear": ("nn.functional.linear", 6),
    "attention": ("nn.functional.scaled_dot_product_attention", 2),
}


def layer_norm(sample: SampleInput) -> tuple[Tensors, dict[str, Any]] | None:
    shape, weight, bias, eps = _arguments(
        sample, ("normalized_shape", None), ("weight", None), ("bias", None), ("eps", 1e-5)
    )
    if len(shape) != 1 or sample.input.dim() == 0:
        return None
    given = {"weight": weight is not None, "bias": bias is not None}
    tensors = {"x": sample.input} | {n: t for n, t in (("weight", weight), ("bias", bias)) if t is not None}
    return tensors, given | {"eps": eps}


def rms_norm(sample: SampleInput) -> tuple[Tensors, dict[str, Any]] | None:
    shape, weight, eps = _arguments(sample, ("normalized_shape", None), ("weight", None), ("eps", None))
    if len(shape) != 1 or sample.input.dim() == 0:
        return None
    given = {"weight": weight is not None, "eps": torch.finfo(sample.input.dtype).eps if eps is None else eps}
    return {"x": sample.input} | ({} if weight is None else {"weight": weight}), given


def gelu(sample: SampleInput) -> tuple[Tensors, dict[str, Any]] | None:
    (approximate,) = _arguments(sample, ("approximate", "none"))
    return {"x": sample.input}, {"approximate": approximate}


def matmul(sample: SampleInput) -> tuple[Tensors, dict[str, Any]] | None:
    (other,) = _arguments(sample, ("other", None))
    if sample.input.dim() < 2 or other.dim() < 2:
        return None
    return {"a": sample.input, "b": other}, {}


def linear(sample: SampleInput) -> tuple[Tensors, dict[str, Any]] | None:
    weight, bias = _arguments(sample, ("weight", None), ("bias", None))
    if weight.dim() != 2 or (bias is not None and bias.dim() != 1):
        return None
    return {"x": sample.input, "weight": weight} | ({} if bias is None else {"bias": bias}), {}


def attention(sample: SampleInput) -> tuple[Tensors, dict[str, Any]] | None:
    names = (
        ("key", None),
        ("value", None),
        ("attn_mask", None),
        ("dropout_p", 0.0),
        ("is_causal", False),
        ("scale", None),
    )
    k, v, mask, dropout, causal, scale = _arguments(sample, *names)
    q = sample.input
    if mask is not None or dropout or causal or sample.kwargs.get("enable_gqa"):
        return None
    if q.dim() not in (3, 4) or k.shape != v.shape or q.shape[1:-2] != k.shape[1:-2]:
        return None
    if q.dim() == 3:
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))
    return {"q": q.transpose(1, 2), "k": k.transpose(1, 2), "v": v.transpose(1, 2)}, {"scale": scale}


WITHIN_CONTRACT = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "gelu": gelu,
    "matmul": matmul,
    "linear": linear,
    "attention": attention,
}


def _arguments(sample: SampleInput, *names: tuple[str, Any]) -> list[Any]:
    """The arguments behind the input, positional or by name, with PyTorch's defaults."""
    return [
        sample.args[i] if i < len(sample.args) else sample.kwargs.get(name, default)
        for i, (name, default) in enumerate(names)
    ]


def problems(op: str, device: torch.device, dtype: torch.dtype) -> Iterator[Problem]:
    name = NAMES[op][0]
    info: OpInfo = next(o for o in op_db if o.name == name and not o.variant_test_name)
    for sample in info.sample_inputs(device, dtype, requires_grad=False):
        if (found := WITHIN_CONTRACT[op](sample)) is None:
            continue
        tensors, options = found
        case = Case(op, "sample", (), tuple(options.items()), dtype=str(dtype).removeprefix("torch."), direction="bwd")
        dy = draw.randn_like(DEFINITIONS[op].call(backend_ops("reference"), case, tensors))
        yield Problem(case, tensors, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", NAMES)
def test_samples_give_the_same_forward_and_backward(backend, device, op, dtype):
    if dtype not in NATIVE[backend].dtypes:
        pytest.skip(f"{backend} has no {dtype}")
    count = 0
    for problem in problems(op, device, dtype):
        got = call(problem, lambda t: DEFINITIONS[op].call(backend_ops(backend), problem.case, t))  # noqa: B023
        shapes = {name: list(x.shape) for name, x in problem.tensors.items()}
        for verdict in compare_all(problem, got):
            assert verdict.ok, f"{op} of {shapes} {dict(problem.case.options)}: {verdict.text}"
        count += 1
    assert count >= NAMES[op][1], f"only {count} samples lie within the contract"


def test_gradients_are_part_of_the_comparison():
    problem = next(problems("linear", torch.device("cpu"), torch.float32))
    got: dict[str, Tensor] = call(problem, lambda t: torch.nn.functional.linear(*t.values()))
    assert set(got) == {"out", *problem.tensors}
