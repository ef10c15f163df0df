"""The ops of a Vision Transformer, each on every backend: `vit.ops.<op>(..., backend="auto")`.

Each module of this package that starts with an underscore is one op, or a routine without gradients, and defines OP.
OPS and ROUTINES, made of them, are the only lists of them in Python: tests, benchmarks, `vit info` and the
documentation iterate over them.

What is no tensor is a TypeError that names the argument. Sizes and dtypes that do not fit are a ValueError of a native
backend; the reference is plain PyTorch, whose own errors (most are RuntimeErrors) stand.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..backends import Spec
from . import bound, routine
from ._attention import attention
from ._attention_rows import attention_rows
from ._gelu import gelu, quick_gelu, relu, silu
from ._layer_norm import layer_norm
from ._linear import linear
from ._linear_fp8 import linear_fp8
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
    "attention_rows",
    "bind",
    "gelu",
    "layer_norm",
    "linear",
    "linear_fp8",
    "linear_int8",
    "matmul",
    "movement",
    "quick_gelu",
    "rms_norm",
    "rotary",
    "relu",
    "silu",
    "swiglu",
]

_MODULES = [m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith("_")]
_RECORDS = [importlib.import_module(f"{__name__}.{name}").OP for name in _MODULES]
OPS: dict[str, Op] = {record.name: record for record in _RECORDS if isinstance(record, Op)}
#: What has a forward alone.
ROUTINES: dict[str, Routine] = {record.name: record for record in _RECORDS if isinstance(record, Routine)}

for _record in OPS.values():
    bound.bind_all(_record)
for _routine in ROUTINES.values():
    routine.bind_all(_routine)

#: Both: what a plan may hold.
ALL: dict[str, Op | Routine] = {**OPS, **ROUTINES}


def bind(op: str, backend: str, strict: bool = True) -> BoundOp:
    """The callable that runs `op` on one backend, or for "auto" on the best one for each call's arguments.

    Under a transform of torch.func, or forward-mode differentiation, kernels raise BackendError; not strict (as a plan
    for "auto" binds them), the reference runs.
    """
    return bound.bind(ALL[op], backend, strict)
