"""The ops of a Vision Transformer, each on every backend: `vit.ops.<op>(..., backend="auto")`.

OPS is the only list of them in Python: tests, benchmarks, `vit info` and the documentation iterate over it.

What is no tensor is a TypeError that names the argument. Sizes and dtypes that do not fit are a ValueError of a native
backend; the reference is plain PyTorch, whose own errors (most are RuntimeErrors) stand.
"""

from __future__ import annotations

from ..backends import Spec
from . import _attention, _gelu, _layer_norm, _linear, _matmul, _rms_norm, _rotary, _swiglu, bound
from ._attention import attention
from ._gelu import gelu, quick_gelu, silu
from ._layer_norm import layer_norm
from ._linear import linear
from ._matmul import matmul
from ._rms_norm import rms_norm
from ._rotary import rotary
from ._swiglu import swiglu
from .bound import BoundOp
from .movement import TORCH as movement  # what modules without a plan use
from .op import Op

__all__ = [
    "OPS",
    "BoundOp",
    "Op",
    "Spec",
    "attention",
    "bind",
    "gelu",
    "layer_norm",
    "linear",
    "matmul",
    "movement",
    "quick_gelu",
    "rms_norm",
    "rotary",
    "silu",
    "swiglu",
]

_MODULES = (_layer_norm, _rms_norm, _gelu, _swiglu, _matmul, _linear, _rotary, _attention)

OPS: dict[str, Op] = {m.OP.name: m.OP for m in _MODULES}

for _record in OPS.values():
    bound.bind_all(_record)


def bind(op: str, backend: str) -> BoundOp:
    """The callable that runs `op` on one backend, or for "auto" on the best one for each call's arguments."""
    return bound.bind(OPS[op], backend)
