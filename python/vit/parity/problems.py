"""From a case to tensors: their values, dtypes and places in memory."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..support.random import normal
from .case import Case, Ops, Tensors
from .definitions import DEFINITIONS, leading
from .tolerance import accumulator

__all__ = ["DEFINITIONS", "Ops", "Problem", "Tensors", "build", "fill", "lay_out", "out_dtype", "torch_dtype"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The tensors of a case: `tensors` in its dtypes and layouts, `dy` the incoming gradient."""

    case: Case
    tensors: Tensors
    dy: Tensor


def build(case: Case, device: str | torch.device = "cpu") -> Problem:
    """The tensors of a case on a device; the same ones in every process (the seed is the case's id)."""
    definition = DEFINITIONS[case.op]
    key = ("case", dataclasses.replace(case, direction="", tf32=False).id)
    drawn = {name: normal(shape, *key, name, dtype=torch.float64) for name, shape in definition.shapes(case).items()}
    definition.draw(case, drawn)
    for request in filter(None, case.values.split("+")):
        kind, name = request.split("_")
        fill(drawn[name], kind, case.dtype)
    cast = {name: x.to(_dtype_of(case, name)) for name, x in drawn.items()}
    tensors = {name: lay_out(x.to(device), name, case.layout) for name, x in cast.items()}
    out = _out_shape(case, {name: x.shape for name, x in tensors.items()})
    dy = normal(out, *key, "dy", dtype=torch.float64).to(out_dtype(case))
    return Problem(case, tensors, dy.to(device))


def fill(x: Tensor, kind: str, dtype: str) -> None:
    """Makes the values of one input (float64, in place) unusual."""
    huge = 2.0 ** (5 if dtype == "float16" else 50)
    if kind in ("huge", "tiny", "big", "wide", "limit"):
        # "limit": products of two such numbers, summed over a head, stay just below the largest float32.
        x.mul_({"huge": huge, "tiny": 1 / huge, "big": 8.0, "wide": 16.0, "limit": 2.0**59}[kind])
    elif kind == "offset":
        x.add_(1000.0 if dtype in ("float32", "float64") else 100.0)
    elif kind == "constant":
        x.copy_(x[..., :1] if x.dim() < 3 else x[:, :1])  # equal rows of layer_norm, equal keys of attention
    elif kind == "zero":
        x.zero_()
    elif kind == "nan":
        x.view(-1)[x.numel() // 3] = math.nan
    elif kind == "inf":
        x.view(-1)[x.numel() // 3] = math.inf
        x.view(-1)[x.numel() // 2] = -math.inf
    else:
        raise ValueError(f"unknown kind of values {kind!r}")


def lay_out(x: Tensor, name: str, layout: str) -> Tensor:
    """The same values at other places in memory. What lies between them is NaN: whoever reads it shows it.

    rows        last dimension padded by 3      offset1, offset3   contiguous, 1 or 3 elements into a buffer
    columns     every second element of a row   transposed         last two dimensions swapped in memory
    expanded    first dimension has stride 0    tokens             every second index of dimension 1
    packed      a third of [B, N, 3, H, D]      heads_first        [B, H, N, D] in memory
    nt, tn, tt  transposed b, a, both (matmul)
    """
    vector = x.dim() < 2
    if layout in ("offset1", "offset3"):
        shift = int(layout[-1])
        buffer = x.new_full((x.numel() + shift + 3,), math.nan)
        return buffer[shift : shift + x.numel()].view(x.shape).copy_(x)
    if layout == "columns" or (layout == "rows" and not vector):
        size = x.shape[-1]
        wide = x.new_full((*x.shape[:-1], 2 * size if layout == "columns" else size + 3), math.nan)
        return (wide[..., ::2] if layout == "columns" else wide[..., :size]).copy_(x)
    if layout == "tokens" and x.dim() >= 3:
        wide = x.new_full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), math.nan)
        return wide[:, ::2].copy_(x)
    if (layout == "transposed" and not vector) or (name, layout) in (
        ("b", "nt"),
        ("a", "tn"),
        ("a", "tt"),
        ("b", "tt"),
    ):
        return x.mT.contiguous().mT
    if layout == "expanded" and not vector and name not in ("weight", "b", "residual", "table"):
        return x[:1].contiguous().expand(x.shape)
    if layout == "packed" and name != "table":
        buffer = x.new_full((*x.shape[:2], 3, *x.shape[2:]), math.nan)
        return buffer[:, :, max("qkv".find(name), 0)].copy_(x)
    if layout == "heads_first" and name != "table":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


def out_dtype(case: Case) -> torch.dtype:
    """The dtype of the op's output."""
    dtype = torch_dtype(case.out_dtype or case.dtype)
    return accumulator(dtype) if case.op == "attention_rows" else dtype


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _dtype_of(case: Case, name: str) -> torch.dtype:
    if name in ("weight", "bias", "table"):
        return torch_dtype(case.param_dtype or case.dtype)
    return out_dtype(case) if name in ("residual", "scale") else torch_dtype(case.dtype)


def _out_shape(case: Case, shapes: dict[str, torch.Size]) -> tuple[int, ...]:
    if case.op == "matmul":
        return (*leading(case, "bh"), case["m"], case["n"])
    if case.op == "linear":
        return (*shapes["x"][:-1], case["n"])
    if case.op == "attention_rows":
        (b, n, h, _), queries = shapes["q"], case.option("queries")
        return b, h, n if queries is None else len(queries), shapes["k"][1]
    if case.op == "swiglu":
        return (*shapes["x"][:-1], case["c"])
    return tuple(next(iter(shapes.values())))
