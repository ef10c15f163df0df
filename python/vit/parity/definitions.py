"""What the case list needs to know of each op: its inputs, the call, PyTorch's own op, the size of rounding errors.

magnitude(t, dy) is the op's formula, and that of each gradient, on the absolute values of its terms: sums of
absolute values for sums and products, and where a rounded value goes through a curve (exp, erf), that value's
magnitude times the curve's derivative. Times the accumulator's eps it is the size of unavoidable noise.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attention, AttentionRows
from .case import Case, Ops, Tensors
from .curves import activated, curve


class LayerNorm:
    backward_work = 1.5

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        c = case["c"]
        shapes = {"x": (*leading(case, "bm"), c)}
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
        return 2.0 * math.prod(self.shapes(case)["x"]) * _bytes(case), "GB/s"


class RmsNorm:
    backward_work = 1.5

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        c = case["c"]
        return {"x": (*leading(case, "bm"), c)} | ({"weight": (c,)} if case.option("weight", True) else {})

    def draw(self, case: Case, tensors: Tensors) -> None:
        if "weight" in tensors:
            tensors["weight"].mul_(0.5).add_(1)

    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor:
        return ops.rms_norm(t["x"], t.get("weight"), case.option("eps", 1e-6))

    def torch(self, case: Case, t: Tensors) -> Tensor:
        x, w = t["x"], t.get("weight")
        return F.rms_norm(x, x.shape[-1:], None if w is None else w.to(x.dtype), case.option("eps", 1e-6))

    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors:
        x, w = t["x"], t.get("weight", torch.ones(()))
        rstd = (x.square().mean(-1, keepdim=True) + case.option("eps", 1e-6)).rsqrt()
        normal = (x * rstd).abs()
        g = (dy * w).abs()
        dx = rstd * (g + normal * (g * normal).mean(-1, keepdim=True))
        return {"out": normal * w.abs(), "x": dx, "weight": (dy.abs() * normal).sum(tuple(range(x.dim() - 1)))}

    def work(self, case: Case) -> tuple[float, str]:
        return 2.0 * math.prod(self.shapes(case)["x"]) * _bytes(case), "GB/s"


class Swiglu:
    backward_work = 1.67  # five tensors for three

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        rows, c = leading(case, "bm"), case["c"]
        return {"x": (*rows, 2 * c)} if case.option("packed") else {"x": (*rows, c), "gate": (*rows, c)}

    def draw(self, case: Case, tensors: Tensors) -> None:
        tensors["x"].mul_(2)

    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor:
        return ops.swiglu(t["x"], t.get("gate"))

    def torch(self, case: Case, t: Tensors) -> Tensor:
        gate, x = t["x"].chunk(2, dim=-1) if case.option("packed") else (t["gate"], t["x"])
        return F.silu(gate) * x

    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors:
        gate, x = t["x"].chunk(2, dim=-1) if case.option("packed") else (t["gate"], t["x"])
        value, first, second = curve(gate, "silu")
        weight, dy = value + first * gate.abs(), dy.abs()
        dx, dgate = dy * weight, dy * x.abs() * (first + second * gate.abs())
        out = {"out": weight * x.abs()}
        return out | ({"x": torch.cat([dgate, dx], -1)} if case.option("packed") else {"x": dx, "gate": dgate})

    def work(self, case: Case) -> tuple[float, str]:
        return 3.0 * math.prod(leading(case, "bm")) * case["c"] * _bytes(case), "GB/s"


class Rotary:
    backward_work = 1.0

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        b, n, h, d = (case[letter] for letter in "bnhd")
        lead = {"shared": (), "heads": (h,), "samples": (b, 1), "both": (b, h)}[case.option("table", "shared")]
        return {"x": (b, n, h, d), "table": (*lead, n - case.option("prefix", 0), 2 * d)}

    def draw(self, case: Case, tensors: Tensors) -> None:
        pass

    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor:
        return ops.rotary(t["x"], t["table"], case.option("prefix", 0), case.option("pairing", "interleaved"))

    def torch(self, case: Case, t: Tensors) -> Tensor:
        """timm's apply_rot_embed_cat on the tokens behind the prefix."""
        prefix = case.option("prefix", 0)
        x, (sin, cos) = t["x"][:, prefix:].transpose(1, 2), t["table"].chunk(2, dim=-1)
        if case.option("pairing") == "half":
            a, b = x.chunk(2, dim=-1)
            turned = torch.cat([-b, a], dim=-1)
        else:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape(x.shape)
        y = (x * cos + turned * sin).to(x.dtype).transpose(1, 2)
        return torch.cat([t["x"][:, :prefix], y], dim=1)

    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors:
        """The formula and its gradients with a plus wherever there is a minus."""
        prefix, half = case.option("prefix", 0), case.option("pairing") == "half"

        def partner(x: Tensor) -> Tensor:
            return x.roll(x.shape[-1] // 2, -1) if half else x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)

        x, g = (a.abs()[:, prefix:].transpose(1, 2) for a in (t["x"], dy))
        sin, cos = t["table"].abs().chunk(2, dim=-1)
        out, dx = x * cos + partner(x) * sin, g * cos + partner(g * sin)
        dtable = torch.cat([g * partner(x), g * x], dim=-1).sum_to_size(t["table"].shape)
        head = {"out": t["x"].abs()[:, :prefix], "x": dy.abs()[:, :prefix]}
        whole = {name: torch.cat([head[name], y.transpose(1, 2)], 1) for name, y in (("out", out), ("x", dx))}
        return whole | {"table": dtable}

    def work(self, case: Case) -> tuple[float, str]:
        return 2.0 * math.prod(self.shapes(case)["x"]) * _bytes(case), "GB/s"


class Gelu:
    backward_work = 1.5

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        return {"x": (*leading(case, "bm"), case["c"])}

    def draw(self, case: Case, tensors: Tensors) -> None:
        tensors["x"].mul_(2)  # both tails

    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor:
        return ops.gelu(t["x"], case.option("approximate", "none"))

    def torch(self, case: Case, t: Tensors) -> Tensor:
        return activated(t["x"], APPROXIMATE[case.option("approximate", "none")])

    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors:
        value, first, second = curve(t["x"], APPROXIMATE[case.option("approximate", "none")])
        x = t["x"].abs()
        return {"out": value + first * x, "x": dy.abs() * (first + second * x)}

    def work(self, case: Case) -> tuple[float, str]:
        return 2.0 * math.prod(self.shapes(case)["x"]) * _bytes(case), "GB/s"


class Matmul:
    backward_work = 2.0

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        batch = leading(case, "bh")
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
        return 2.0 * math.prod(leading(case, "bh")) * case["m"] * case["n"] * case["k"], "GFLOP/s"


class Linear:
    backward_work = 2.0

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        rows, n, k = leading(case, "bm"), case["n"], case["k"]
        shapes: dict[str, tuple[int, ...]] = {"x": (*rows, k), "weight": (n, k)}
        if case.option("bias", True):
            shapes["bias"] = (n,)
        if case.option("residual"):
            shapes["residual"] = (*rows, n)
        if case.option("scale"):
            shapes["scale"] = (n,)
        return shapes

    def draw(self, case: Case, tensors: Tensors) -> None:
        tensors["weight"].mul_(case["k"] ** -0.5 if case["k"] else 1)

    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor:
        x, options = t["x"], {"activation": case.option("activation"), "residual": t.get("residual")}
        options |= {"scale": t["scale"]} if "scale" in t else {}
        # float32 weights meet bfloat16 activations under autocast only.
        mixed = t["weight"].dtype != x.dtype
        with torch.autocast(x.device.type, x.dtype if mixed else torch.bfloat16, enabled=mixed):
            return ops.linear(x, t["weight"], t.get("bias"), **options)

    def torch(self, case: Case, t: Tensors) -> Tensor:
        x, bias = t["x"], t.get("bias")
        y = F.linear(x, t["weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))
        if activation := case.option("activation"):
            y = activated(y, activation)
        if "scale" in t:
            y = y * t["scale"].to(x.dtype)
        return y if "residual" not in t else y + t["residual"]

    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors:
        x, w, bias = t["x"], t["weight"], t.get("bias")
        rows = math.prod(x.shape[:-1])
        x2, dy2 = x.abs().reshape(rows, x.shape[-1]), dy.abs().reshape(rows, dy.shape[-1])
        out = x.abs() @ w.abs().mT
        if bias is not None:
            out = out + bias.abs()
        dpre = dy2 if "scale" not in t else dy2 * t["scale"].abs()
        if activation := case.option("activation"):
            value, first, second = curve(F.linear(x, w, bias), activation)
            dpre = dpre * (first + second * out).reshape(dy2.shape)
            out = value + first * out
        activated = out
        if "scale" in t:
            out = out * t["scale"].abs()
        if "residual" in t:
            out = out + t["residual"].abs()
        grads = {
            "x": (dpre @ w.abs()).reshape(x.shape),
            "weight": dpre.mT @ x2,
            "bias": dpre.sum(0),
            "residual": dy.abs(),
            "scale": (dy2 * activated.reshape(dy2.shape)).sum(0),
        }
        return {"out": out} | {name: grads[name] for name in t}

    def work(self, case: Case) -> tuple[float, str]:
        return 2.0 * math.prod(leading(case, "bm")) * case["n"] * case["k"], "GFLOP/s"


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
    "rms_norm": RmsNorm(),
    "gelu": Gelu(),
    "swiglu": Swiglu(),
    "matmul": Matmul(),
    "linear": Linear(),
    "rotary": Rotary(),
    "attention": Attention(),
    "attention_rows": AttentionRows(),
}


def leading(case: Case, letters: str) -> tuple[int, ...]:
    sizes = dict(case.sizes)
    return tuple(sizes[letter] for letter in letters if letter in sizes)


#: vit::Activation's names by those of vit.ops.gelu.
APPROXIMATE = {"none": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu", "silu": "silu", "relu": "relu"}


def _bytes(case: Case) -> int:
    return getattr(torch, case.dtype).itemsize
