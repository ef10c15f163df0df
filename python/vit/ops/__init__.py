"""The ops of a Vision Transformer, each on every backend: `vit.ops.<op>(..., backend="auto")`.

OPS is the only list of them: tests, benchmarks, `vit info` and the documentation iterate over it.

What is no tensor is a TypeError that names the argument. Sizes and dtypes that do not fit are a ValueError of a native
backend; the reference is plain PyTorch, whose own errors (most are RuntimeErrors) stand.
"""

from __future__ import annotations

from ..backends import Spec
from . import attention as _attention
from . import gelu as _gelu
from . import layer_norm as _layer_norm
from . import linear as _linear
from . import matmul as _matmul
from . import movement as _movement
from . import op as _op
from .op import BoundOp, Op

OPS: dict[str, Op] = {m.OP.name: m.OP for m in (_layer_norm, _gelu, _matmul, _linear, _attention)}

# The modules of the ops bear the ops' names; the package's own names are the public functions.
layer_norm = _layer_norm.layer_norm
gelu = _gelu.gelu
matmul = _matmul.matmul
linear = _linear.linear
attention = _attention.attention
movement = _movement.TORCH  # what modules without a plan use

__all__ = ["OPS", "BoundOp", "Op", "Spec", "attention", "bind", "gelu", "layer_norm", "linear", "matmul"]

for _record in OPS.values():
    _op.bind_all(_record)


def bind(op: str, backend: str) -> BoundOp:
    """The callable that runs `op` on one backend, or for "auto" on the best one for each call's arguments."""
    return _op.bind(OPS[op], backend)
