"""From a case to tensors: inputs, the call, PyTorch's own op, and the magnitude of the rounding errors.

One small class per op. A new op needs one here and its shapes in `cases.py`; everything else follows.

magnitude(t, dy) is the op's formula, and that of each gradient, on the absolute values of its terms: sums of
absolute values for sums and products, and where a rounded value goes through a curve (exp, erf), that value's
magnitude times the curve's derivative. Times the accumulator's eps it is the size of unavoidable noise.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .case_list import Case

Tensors = dict[str, Tensor]


class Ops(Protocol):
    """What is tested: the five public ops without `backend`, e.g. `plan.ops` or `backend_ops(name)`."""

    layer_norm: Callable[..., Tensor]
    gelu: Callable[..., Tensor]
    matmul: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    attention: Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The tensors of a case: `tensors` in its dtypes and layouts, `dy` the incoming gradient."""

    case: Case
    tensors: Tensors
    dy: Tensor


class LayerNorm:
    backward_work = 1.5

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        c = case["c"]
        shapes = {"x": (*_leading(case, "bm"), c)}
        return shapes | {name: (c,) for name in ("weight", "bias") if case.option(name, True)}

    def draw(self, case: Case, tensors: Tensors) -> None:
        if "weight" in tensors:
            tensors["weight"].mul_(0.5).add_(1)

    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor:
        return ops.layer_norm(t["x"], t.get("weight"), t.get("bias"), case.option("eps", 1e-6))

    def torch(self, case: Case, t: Tensors) -> Tensor:
        x, w, b = t["x"], t.get("weight"), t.get("bias")
        if x.device.type != "cpu":  # only the CPU's own op takes float32 parameters for bfloat16 rows
            w, b = (p if p is None else p.to(x.dtype) for p in (w, b))
        return F.layer_norm(x, x.shape[-1:], w, b, case.option("eps", 1e-6))

    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors:
        x, w = t["x"], t.get("weight", torch.ones(()))
        mean = x.mean(-1, keepdim=True)
        rstd = ((x - mean).square().mean(-1, keepdim=True) + case.option("eps", 1e-6)).rsqrt()
        normal, rounded = ((x - mean) * rstd).abs(), (x.abs() + x.abs().mean(-1, keepdim=True)) * rstd
        g = (dy * w).abs()
        sums = g + g.mean(-1, keepdim=True)
        sums = sums + rounded * (g * normal).mean(-1, keepdim=True) + normal * (g * rounded).mean(-1, keepdim=True)
        rows = tuple(range(x.dim() - 1))
        out = {"out": rounded * w.abs(), "x": rstd * sums, "weight": (dy.abs() * rounded).sum(rows)}
        if "bias" in t:
            out |= {"out": out["out"] + t["bias"].abs(), "bias": dy.abs().sum(rows)}
        return out

    def work(self, case: Case) -> tuple[float, str]:
        """Bytes or FLOPs of the forward, for benchmarks."""
        return 2.0 * _numel(self.shapes(case)["x"]) * _bytes(case), "GB/s"


class Gelu:
    backward_work = 1.5

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        return {"x": (*_leading(case, "bm"), case["c"])}

    def draw(self, case: Case, tensors: Tensors) -> None:
        tensors["x"].mul_(2)  # both tails

    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor:
        return ops.gelu(t["x"], case.option("approximate", "none"))

    def torch(self, case: Case, t: Tensors) -> Tensor:
        return F.gelu(t["x"], approximate=case.option("approximate", "none"))

    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors:
        value, first, second = _gelu_curve(t["x"], case.option("approximate", "none"))
        x = t["x"].abs()
        return {"out": value + first * x, "x": dy.abs() * (first + second * x)}

    def work(self, case: Case) -> tuple[float, str]:
        return 2.0 * _numel(self.shapes(case)["x"]) * _bytes(case), "GB/s"


class Matmul:
    backward_work = 2.0

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        batch = _leading(case, "bh")
        a, b = (*batch, case["m"], case["k"]), (*batch, case["k"], case["n"])
        narrow = (
            {"broadcast_a": (1, *a[1:]), "single_a": a[-2:]},
            {"broadcast_b": (b[0], 1, *b[2:]), "single_b": b[-2:]},
        )
        return {"a": narrow[0].get(case.layout, a), "b": narrow[1].get(case.layout, b)}

    def draw(self, case: Case, tensors: Tensors) -> None:
        tensors["b"].mul_(case["k"] ** -0.5 if case["k"] else 1)

    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor:
        return ops.matmul(t["a"], t["b"])

    def torch(self, case: Case, t: Tensors) -> Tensor:
        return torch.matmul(t["a"], t["b"])

    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors:
        a, b, dy = t["a"].abs(), t["b"].abs(), dy.abs()
        return {"out": a @ b, "a": (dy @ b.mT).sum_to_size(a.shape), "b": (a.mT @ dy).sum_to_size(b.shape)}

    def work(self, case: Case) -> tuple[float, str]:
        return 2.0 * math.prod(_leading(case, "bh")) * case["m"] * case["n"] * case["k"], "GFLOP/s"


class Linear:
    backward_work = 2.0

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        rows, n, k = _leading(case, "bm"), case["n"], case["k"]
        shapes: dict[str, tuple[int, ...]] = {"x": (*rows, k), "weight": (n, k)}
        if case.option("bias", True):
            shapes["bias"] = (n,)
        if case.option("residual"):
            shapes["residual"] = (*rows, n)
        return shapes

    def draw(self, case: Case, tensors: Tensors) -> None:
        tensors["weight"].mul_(case["k"] ** -0.5 if case["k"] else 1)

    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor:
        x, options = t["x"], {"activation": case.option("activation"), "residual": t.get("residual")}
        # float32 weights meet bfloat16 activations under autocast only.
        mixed = t["weight"].dtype != x.dtype
        with torch.autocast(x.device.type, x.dtype if mixed else torch.bfloat16, enabled=mixed):
            return ops.linear(x, t["weight"], t.get("bias"), **options)

    def torch(self, case: Case, t: Tensors) -> Tensor:
        x, bias = t["x"], t.get("bias")
        y = F.linear(x, t["weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))
        if activation := case.option("activation"):
            y = F.gelu(y, approximate=_approximation(activation))
        return y if "residual" not in t else y + t["residual"]

    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors:
        x, w, bias = t["x"], t["weight"], t.get("bias")
        rows = math.prod(x.shape[:-1])
        x2, dy2 = x.abs().reshape(rows, x.shape[-1]), dy.abs().reshape(rows, dy.shape[-1])
        out = x.abs() @ w.abs().mT
        if bias is not None:
            out = out + bias.abs()
        dpre = dy2
        if activation := case.option("activation"):
            value, first, second = _gelu_curve(F.linear(x, w, bias), _approximation(activation))
            dpre = dy2 * (first + second * out).reshape(dy2.shape)
            out = value + first * out
        if "residual" in t:
            out = out + t["residual"].abs()
        grads = {
            "x": (dpre @ w.abs()).reshape(x.shape),
            "weight": dpre.mT @ x2,
            "bias": dpre.sum(0),
            "residual": dy.abs(),
        }
        return {"out": out} | {name: grads[name] for name in t}

    def work(self, case: Case) -> tuple[float, str]:
        return 2.0 * math.prod(_leading(case, "bm")) * case["n"] * case["k"], "GFLOP/s"


class Attention:
    backward_work = 2.5

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        b, n, h, d = (case[letter] for letter in "bnhd")
        length = dict(case.sizes).get("l", n)
        return {"q": (b, n, h, d), "k": (b, length, h, d), "v": (b, length, h, d)}

    def draw(self, case: Case, tensors: Tensors) -> None:
        pass

    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor:
        return ops.attention(t["q"], t["k"], t["v"], scale=case.option("scale"))

    def torch(self, case: Case, t: Tensors) -> Tensor:
        q, k, v = (t[name].transpose(1, 2) for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v, scale=case.option("scale")).transpose(1, 2)

    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors:
        q, k, v, do = (x.transpose(1, 2) for x in (t["q"], t["k"], t["v"], dy))
        scale = case.option("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        p = (scale * q @ k.mT).softmax(-1)
        scores = abs(scale) * q.abs() @ k.abs().mT
        # dp_i = p_i (ds_i - sum_j p_j ds_j) with every ds_j of size scores_j: what rounded scores do to p.
        others = (p * scores).sum(-1, keepdim=True) - p * scores
        rounded = p * (scores * (1 - p) + others.clamp_min(0))
        out = (p + rounded) @ v.abs()
        # The backward takes p = exp(s - lse) from the saved lse: now the rounding of lse itself counts too.
        rounded = p * (scores + (scale * q @ k.mT).logsumexp(-1, keepdim=True).abs())
        dp = do @ v.mT
        dp_abs = do.abs() @ v.abs().mT
        centred = (dp - (p * dp).sum(-1, keepdim=True)).abs()
        ds = p * (dp_abs + (p * dp_abs + rounded * dp.abs()).sum(-1, keepdim=True)) + rounded * centred
        ds = abs(scale) * ds
        grads = {
            "out": out,
            "q": ds @ k.abs(),
            "k": ds.mT @ q.abs(),
            "v": (p + rounded).mT @ do.abs(),
        }
        return {name: x.transpose(1, 2) for name, x in grads.items()}

    def work(self, case: Case) -> tuple[float, str]:
        keys = self.shapes(case)["k"][1]
        return 4.0 * case["b"] * case["h"] * case["n"] * keys * case["d"], "GFLOP/s"


class Definition(Protocol):
    #: Backward over forward work, for benchmarks: a product has two for one, attention five for two.
    backward_work: float

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]: ...
    def draw(self, case: Case, tensors: Tensors) -> None: ...
    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor: ...
    def torch(self, case: Case, t: Tensors) -> Tensor: ...
    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors: ...
    def work(self, case: Case) -> tuple[float, str]: ...


DEFINITIONS: dict[str, Definition] = {
    "layer_norm": LayerNorm(),
    "gelu": Gelu(),
    "matmul": Matmul(),
    "linear": Linear(),
    "attention": Attention(),
}


def build(case: Case, device: str | torch.device = "cpu") -> Problem:
    """The tensors of a case on a device; the same ones in every process (the seed is the case's id)."""
    definition = DEFINITIONS[case.op]
    generator = torch.Generator().manual_seed(
        zlib.crc32(dataclasses.replace(case, direction="", tf32=False).id.encode())
    )
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in definition.shapes(case).items()
    }
    definition.draw(case, drawn)
    for request in filter(None, case.values.split("+")):
        kind, name = request.split("_")
        fill(drawn[name], kind, case.dtype)
    cast = {name: x.to(_dtype_of(case, name)) for name, x in drawn.items()}
    tensors = {name: lay_out(x.to(device), name, case.layout) for name, x in cast.items()}
    out = _out_shape(case, {name: x.shape for name, x in tensors.items()})
    dy = torch.randn(out, generator=generator, dtype=torch.float64).to(out_dtype(case))
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
    if layout == "expanded" and not vector and name not in ("weight", "b", "residual"):
        return x[:1].contiguous().expand(x.shape)
    if layout == "packed":
        buffer = x.new_full((*x.shape[:2], 3, *x.shape[2:]), math.nan)
        return buffer[:, :, "qkv".index(name)].copy_(x)
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


def out_dtype(case: Case) -> torch.dtype:
    """The dtype of the op's output."""
    return torch_dtype(case.out_dtype or case.dtype)


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _dtype_of(case: Case, name: str) -> torch.dtype:
    if name in ("weight", "bias"):
        return torch_dtype(case.param_dtype or case.dtype)
    return out_dtype(case) if name == "residual" else torch_dtype(case.dtype)


def _out_shape(case: Case, shapes: dict[str, torch.Size]) -> tuple[int, ...]:
    if case.op == "matmul":
        return (*_leading(case, "bh"), case["m"], case["n"])
    if case.op == "linear":
        return (*shapes["x"][:-1], case["n"])
    return tuple(next(iter(shapes.values())))


def _leading(case: Case, letters: str) -> tuple[int, ...]:
    sizes = dict(case.sizes)
    return tuple(sizes[letter] for letter in letters if letter in sizes)


def _approximation(activation: str) -> str:
    return {"gelu": "none", "gelu_tanh": "tanh"}[activation]


def _gelu_curve(x: Tensor, approximate: str) -> tuple[Tensor, Tensor, Tensor]:
    """|GELU|, |GELU'| and |GELU''| at x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = F.gelu(x, approximate=approximate)
        (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    return value.detach().abs(), first.detach().abs(), second.abs()


def _numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _bytes(case: Case) -> int:
    return torch_dtype(case.dtype).itemsize
