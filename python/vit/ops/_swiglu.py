"""The gated linear unit with a SiLU gate, "SwiGLU" (Shazeer, 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..backends import NativeBackend, Spec
from . import _gelu
from .bound import call
from .launch import contiguous, ptr, row_count, rows
from .op import Op


def swiglu(x: Tensor, gate: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Multiplies each value by the SiLU of its gate.

    y = silu(gate) * x, silu(g) = g / (1 + exp(-g)). Without a gate, x is the packed projection [..., 2 H] with the
    gates in front: y = silu(x[..., :H]) * x[..., H:] (timm's SwiGLUPacked, GluMlp with gate_last=False).

    x and gate [..., H] of one dtype and shape, any rank >= 1; y [..., H], contiguous.
    Raises ValueError for sizes or dtypes that do not fit, BackendError when the named backend cannot run it.
    """
    return call(OP, backend, x=x, gate=gate)


def reference(x: Tensor, gate: Tensor | None = None) -> Tensor:
    """The formula in PyTorch."""
    _check(x, gate)
    if gate is None:
        gate, x = x.chunk(2, dim=-1)
    return _gelu.reference(gate, "silu") * x


def limits(spec: Spec) -> list[str]:
    """None but those of the backend."""
    return []


def _check(x: Tensor, gate: Tensor | None) -> None:
    """ValueError unless x is packed, or goes with its gate."""
    if not x.shape:
        raise ValueError("vit.ops.swiglu: x must have at least one dimension, got a scalar")
    if gate is None and x.shape[-1] % 2:
        raise ValueError(
            f"vit.ops.swiglu: without a gate x is [gates; values], an even last dimension, got {list(x.shape)}"
        )
    if gate is not None and gate.shape != x.shape:
        raise ValueError(
            f"vit.ops.swiglu: x and gate must have one shape, got x {list(x.shape)}, gate {list(gate.shape)}"
        )


# ----- native


def arguments(x: Tensor, gate: Tensor | None = None) -> tuple[tuple[Any, ...], None]:
    """x and gate of one dtype, or a packed x alone."""
    _check(x, gate)
    if gate is not None and gate.dtype != x.dtype:
        raise ValueError(f"vit.ops.swiglu: x and gate must have one dtype, got {x.dtype} and {gate.dtype}")
    return (x, gate), None


FWD = "(Tensor x, Tensor? gate, bool save) -> Tensor y"
FWD_FIELDS = "x gate y M C x_stride gate_stride dtype context"
BWD = "(Tensor dy, Tensor x, Tensor? gate) -> (Tensor dx, Tensor dgate)"
BWD_FIELDS = "dy x gate dx dgate M C x_stride gate_stride dx_stride dgate_stride dtype context"


def fwd_fake(x: Tensor, gate: Tensor | None, save: bool) -> Tensor:
    """y [..., H]."""
    return x.new_empty((*x.shape[:-1], _width(x, gate)))


def launch_fwd(backend: NativeBackend, x: Tensor, gate: Tensor | None, save: bool) -> Tensor:
    """y [..., H]; nothing is saved."""
    width = _width(x, gate)
    y = backend.empty((*x.shape[:-1], width), x.dtype, x.device)
    _, data, strides = _halves(backend, x, gate)
    kernel: Callable[..., None] = backend.lib.swiglu_fwd  # mypy counts wrong where several tuples are given
    kernel(*data, ptr(y), row_count(y.shape), width, *strides, backend.codes[x.dtype], *backend.context(x.device))
    return y


def bwd_fake(dy: Tensor, x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx and dgate like x and gate; of a packed x one gradient."""
    return x.new_empty(x.shape), x.new_empty(0) if gate is None else gate.new_empty(gate.shape)


def launch_bwd(backend: NativeBackend, dy: Tensor, x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dx and dgate, both; of a packed x one gradient."""
    dy = contiguous(backend, dy)
    dx = backend.empty(x.shape, x.dtype, x.device)
    dgate = None if gate is None else backend.empty(gate.shape, gate.dtype, gate.device)
    kept, data, strides = _halves(backend, x, gate)
    _, gradients, gradient_strides = _halves(backend, dx, dgate)
    kernel: Callable[..., None] = backend.lib.swiglu_bwd  # mypy counts wrong where several tuples are given
    kernel(
        ptr(dy), *data, *gradients, row_count(dy.shape), dy.shape[-1], *strides, *gradient_strides,
        backend.codes[x.dtype], *backend.context(x.device),
    )  # fmt: skip
    del kept  # copies of views live until here
    return dx, dgate


def _width(x: Tensor, gate: Tensor | None) -> int:
    """H."""
    return x.shape[-1] // 2 if gate is None else x.shape[-1]


def _halves(
    backend: NativeBackend, x: Tensor, gate: Tensor | None
) -> tuple[tuple[Tensor, Tensor | None], tuple[int, int], tuple[int, int]]:
    """The tensors that own the memory, the addresses of values and gates, the distances between their rows."""
    x, stride = rows(backend, x)
    if gate is None:
        return (x, None), (x.data_ptr() + x.shape[-1] // 2 * x.element_size(), x.data_ptr()), (stride, stride)
    gate, gate_stride = rows(backend, gate)
    return (x, gate), (x.data_ptr(), gate.data_ptr()), (stride, gate_stride)


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keeps x and gate."""
    ctx.save_for_backward(*args)


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dgate: one pass gives both."""
    x, gate = ctx.saved_tensors
    dx, dgate = kernel(dy, x, gate)
    return dx if ctx.needs_input_grad[0] else None, dgate if gate is not None and ctx.needs_input_grad[1] else None


OP = Op(
    name="swiglu",
    reference=reference,
    limits=limits,
    arguments=arguments,
    fwd_schema=FWD,
    fwd_fake=fwd_fake,
    launch_fwd=launch_fwd,
    fwd_fields=FWD_FIELDS,
    bwd_schema=BWD,
    bwd_fake=bwd_fake,
    launch_bwd=launch_bwd,
    bwd_fields=BWD_FIELDS,
    save=save,
    backward=backward,
)
