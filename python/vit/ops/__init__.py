"""The ops of a Vision Transformer, each on every backend: `vit.ops.<op>(..., backend="auto")`.

OPS is the only list of them in Python: tests, benchmarks, `vit info` and the documentation iterate over it.

What is no tensor is a TypeError that names the argument. Sizes and dtypes that do not fit are a ValueError of a native
backend; the reference is plain PyTorch, whose own errors (most are RuntimeErrors) stand.
"""

from __future__ import annotations

from ..backends import Spec
from . import (
    _attention,
    _gelu,
    _layer_norm,
    _linear,
    _linear_int8,
    _matmul,
    _rms_norm,
    _rotary,
    _swiglu,
    bound,
    routine,
)
from ._attention import attention
from ._gelu import gelu, quick_gelu, silu
from ._layer_norm import layer_norm
from ._linear import linear
from ._linear_int8 import linear_int8
from ._matmul import matmul
from ._rms_norm import rms_norm
from ._rotary import rotary
from ._swiglu import swiglu
from .bound import BoundOp
from .movement import TORCH as movement  # what modules without a plan use
from .op import Op
from .routine import Routine

__all__ = [
    "OPS",
    "ROUTINES",
    "BoundOp",
    "Op",
    "Routine",
    "Spec",
    "attention",
    "bind",
    "gelu",
    "layer_norm",
    "linear",
    "linear_int8",
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

#: What has a forward alone, for inference.
ROUTINES: dict[str, Routine] = {_linear_int8.OP.name: _linear_int8.OP}

for _routine in ROUTINES.values():
    routine.bind_all(_routine)

#: Both: what a plan may hold.
ALL: dict[str, Op | Routine] = {**OPS, **ROUTINES}


def bind(op: str, backend: str) -> BoundOp:
    """The callable that runs `op` on one backend, or for "auto" on the best one for each call's arguments."""
    return bound.bind(ALL[op], backend)
