"""The ops of a Vision Transformer, each on every backend: `vit.ops.<op>(..., backend="auto")`.

Each module of this package that starts with an underscore is one op and defines OP. OPS, made of them, is the only
list of ops in Python: tests, benchmarks, `vit info` and the documentation iterate over it.

What is no tensor is a TypeError that names the argument. Sizes and dtypes that do not fit are a ValueError of a native
backend; the reference is plain PyTorch, whose own errors (most are RuntimeErrors) stand.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..backends import Spec
from . import bound
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

_MODULES = [m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith("_")]
OPS: dict[str, Op] = {name[1:]: importlib.import_module(f"{__name__}.{name}").OP for name in _MODULES}

for _record in OPS.values():
    bound.bind_all(_record)


def bind(op: str, backend: str) -> BoundOp:
    """The callable that runs `op` on one backend, or for "auto" on the best one for each call's arguments."""
    return bound.bind(OPS[op], backend)
