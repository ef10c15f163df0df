"""How much work the registered ops are, for `torch.utils.flop_counter.FlopCounterMode`.

Two operations per multiply-add, products alone, as in PyTorch's own formulas (torch/utils/flop_counter.py); the
backward of attention counts the scores that it computes again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def linear_fwd(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def linear_bwd(dy: Shape, x: Shape | None, weight: Shape | None, *rest: Any, **__: Any) -> int:
    mask = rest[-1]
    width = weight[1] if weight is not None else x[-1] if x is not None else 0
    return 2 * math.prod(dy) * width * (mask[0] + mask[1])


def matmul_fwd(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def matmul_bwd(dc: Shape, a: Shape, b: Shape, mask: Sequence[bool], **_: Any) -> int:
    return 2 * math.prod(a) * b[-1] * (mask[0] + mask[1])


def attention_fwd(
    q: Shape,
    k: Shape | None,
    v: Shape | None,
    scale: float,
    queries: int | None,
    lengths: Shape | None,
    *_: Any,
    out_shape: Any,
    **__: Any,
) -> int:
    return 2 * _attention(out_shape[0], q, k, lengths)


def attention_bwd(
    dout: Shape,
    q: Shape,
    k: Shape | None,
    v: Shape | None,
    out: Shape,
    stats: Shape,
    scale: float,
    lengths: Shape | None = None,
    **__: Any,
) -> int:
    return 5 * _attention(dout, q, k, lengths)


def attention_rows(q: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * math.prod(out_shape) * q[-1]


def _attention(out: Shape, q: Shape, k: Shape | None, lengths: Shape | None) -> int:
    """One product of queries and keys: out [B, N, H, D], keys [B, L, H, D] or packed in q [B, L, 3, H, D]; with lengths
    those of each image with its own."""
    keys = (q if k is None else k)[1]
    if lengths is None:
        return 2 * math.prod(out) * keys
    own = lengths if out[1] == keys else [out[1] // len(lengths)] * len(lengths)
    return 2 * out[2] * out[3] * sum(n * m for n, m in zip(own, lengths, strict=True))


FORMULAS: dict[str, Callable[..., int]] = {
    f.__name__: f
    for f in (linear_fwd, linear_bwd, matmul_fwd, matmul_bwd, attention_fwd, attention_bwd, attention_rows)
} | dict.fromkeys(("linear_int8", "linear_fp8"), linear_fwd)
_OPS: dict[Any, Callable[..., int]] = {}


def know(namespace: str, name: str) -> None:
    """Remembers the formula of a registered op, if it has one; PyTorch's table takes 0.1 s to import."""
    if name in FORMULAS:
        _OPS[getattr(getattr(torch.ops, namespace), name)] = FORMULAS[name]


def offer() -> None:
    """Gives the formulas to the counters that are on, and to those that are made later."""
    if (module := sys.modules.get(COUNTER)) is None:
        return
    for op, formula in _OPS.items():
        if op not in module.flop_registry:
            module.register_flop_formula(op)(formula)
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(registry, dict):  # made before, it has a copy of the table
            for op in _OPS:
                registry.setdefault(op, module.flop_registry[op])
