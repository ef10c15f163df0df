"""Scaled dot-product attention (Vaswani et al., 2017, arXiv:1706.03762) without a score matrix in memory
(Dao et al., 2022, arXiv:2205.14135)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..backends import NativeBackend, Spec
from .bound import call
from .launch import acc_dtype, autocast_dtype, contiguous, launch, ptr, zeros
from .op import Op

#: Head dimensions every native kernel takes.
MAX_HEAD_DIM = 256


def attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    scale: float | None = None,
    queries: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Replaces each query by the mean of the values, weighted by the softmax of its scaled products with the keys.

    out[b, n, h] = sum_l softmax_l(scale q[b, n, h] . k[b, l, h]) v[b, l, h], scale = 1 / sqrt(D) unless given.

    q [B, N, H, D]; k, v [B, L, H, D], L >= 1, any strides on B, N (L) and H, so that views of a packed projection
    are read in place; out [B, N, H, D], contiguous. Under autocast all three are cast to its dtype. Without k and v, q
    is the packed projection [B, N, 3, H, D] itself, and so is its gradient, which then needs no copy. `queries`:
    the output for the first `queries` tokens only, out [B, queries, H, D]; all tokens are keys.
    Raises ValueError for sizes or dtypes that do not fit, BackendError when the named backend cannot run it.
    """
    return call(OP, backend, q=q, k=k, v=v, scale=scale, queries=queries)


def reference(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    scale: float | None = None,
    queries: int | None = None,
) -> Tensor:
    """The formula in PyTorch."""
    _check(q, k, v, queries)
    q, k, v = (t.transpose(1, 2) for t in _unpacked(q, k, v, queries))  # [B, H, N, D]
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def limits(spec: Spec) -> list[str]:
    """Head dimensions and dropout that no kernel has."""
    reasons = []
    head_dim = spec.shapes.get("q", ("*",))[-1]
    if isinstance(head_dim, int) and not 1 <= head_dim <= MAX_HEAD_DIM:
        reasons.append(f"head dimension {head_dim} is not within 1..{MAX_HEAD_DIM}")
    if dropout := spec.options.get("dropout", 0.0):
        reasons.append(f"attention dropout {dropout} is not 0")
    return reasons


# ----- native


def arguments(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    scale: float | None = None,
    queries: int | None = None,
) -> tuple[tuple[Any, ...], None]:
    """q, k, v of one dtype, or a packed q alone; the scale; how many queries."""
    _check(q, k, v, queries)
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"vit.ops.attention: head dimension {q.shape[-1]} is not in 1..{MAX_HEAD_DIM}, got {_shapes(q, k, v)}; "
            'use backend="reference"'
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if (dtype := autocast_dtype(q)) is not None:
        q, k, v = (None if t is None else t.to(dtype) for t in (q, k, v))  # type: ignore[assignment]
    if k is not None and v is not None and not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"vit.ops.attention: q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    return (q, k, v, scale, queries), None


def _check(q: Tensor, k: Tensor | None, v: Tensor | None, queries: int | None) -> None:
    """ValueError unless it is q, k, v of sizes that go together, or a packed q alone, and that many tokens."""
    packed = k is None and v is None and q.dim() == 5 and q.shape[2] == 3
    if not packed and (k is None or v is None):
        raise ValueError(
            f"vit.ops.attention: give q, k and v, or one packed q [B, N, 3, H, D] alone, got {_shapes(q, k, v)}"
        )
    if k is not None and v is not None:
        if q.dim() != 4 or k.dim() != 4:
            raise ValueError(f"vit.ops.attention: q, k, v must be [B, N, H, D], got {_shapes(q, k, v)}")
        if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
            raise ValueError(
                "vit.ops.attention: k and v must have one shape, and B, H, D of q ([B, N, H, D]), "
                f"got {_shapes(q, k, v)}"
            )
        if k.shape[1] == 0 and q.numel() > 0:
            raise ValueError(f"vit.ops.attention: at least one key is needed, got {_shapes(q, k, v)}")
    if queries is not None and not 1 <= queries <= q.shape[1]:
        raise ValueError(
            f"vit.ops.attention: queries must be within 1..{q.shape[1]}, the tokens of q, got {queries}; "
            "None stands for all"
        )


def _shapes(q: Tensor, k: Tensor | None, v: Tensor | None) -> str:
    """For error texts."""
    return ", ".join(f"{name} {list(t.shape)}" for name, t in (("q", q), ("k", k), ("v", v)) if t is not None)


def _unpacked(q: Tensor, k: Tensor | None, v: Tensor | None, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, queries, H, D] and k, v [B, N, H, D]: as given, or views of a packed q [B, N, 3, H, D]."""
    if k is None or v is None:
        q, k, v = q.unbind(2)
    return (q if queries is None else q[:, :queries]), k, v


FWD = "(Tensor q, Tensor? k, Tensor? v, float scale, int? queries, bool save) -> (Tensor out, Tensor lse)"
FWD_FIELDS = "q k v out lse B N L H D scale dtype workspace context"
BWD = (
    "(Tensor dout, Tensor q, Tensor? k, Tensor? v, Tensor out, Tensor lse, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)
BWD_FIELDS = "dout q k v out lse dq dk dv B N L H D scale dtype workspace context"


def fwd_fake(
    q: Tensor, k: Tensor | None, v: Tensor | None, scale: float, queries: int | None, save: bool
) -> tuple[Tensor, Tensor]:
    """out [B, queries or N, H, D], lse [B, H, queries or N]."""
    q, _, _ = _unpacked(q, k, v, queries)
    return q.new_empty(q.shape), _new_lse(q) if save else q.new_empty(0)


def _new_lse(q: Tensor) -> Tensor:
    """Memory for the logarithms of the softmax denominators: [B, H, N]."""
    b, n, h, _ = q.shape
    return q.new_empty((b, h, n), dtype=acc_dtype(q.dtype))


def launch_fwd(
    backend: NativeBackend, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float, queries: int | None, save: bool
) -> tuple[Tensor, Tensor | None]:
    """out [B, queries or N, H, D]; lse [B, H, queries or N] to be saved."""
    q, k, v = _unpacked(q, k, v, queries)
    q, k, v = _adjacent(backend, q), _adjacent(backend, k), _adjacent(backend, v)
    shape, dtype, device = q.shape, q.dtype, q.device
    out, lse = backend.empty(shape, dtype, device), _new_lse(q) if save else None
    b, n, h, d = shape
    fields = (
        *_heads(q), *_heads(k), *_heads(v), ptr(out), ptr(lse), b, n, k.shape[1], h, d, scale, backend.codes[dtype]
    )  # fmt: skip
    launch(backend, backend.lib.attention_fwd, fields, device)
    return out, lse


def bwd_fake(
    dout: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v; of a packed q one gradient."""
    if k is None or v is None:
        return q.new_empty(q.shape), q.new_empty(0), q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def launch_bwd(
    backend: NativeBackend,
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv like q, k, v, all three; of a packed q one gradient."""
    dout = contiguous(backend, dout)
    queries, dtype, device = dout.shape[1], q.dtype, q.device

    def gradient(x: Tensor) -> Tensor:
        if queries == q.shape[1]:
            return backend.empty(x.shape, dtype, device)
        return zeros(backend, x.shape, dtype, device)  # of the other tokens, which no kernel writes

    grads = tuple(None if t is None else gradient(t) for t in (q, k, v))
    dq, dk, dv = _unpacked(*grads, queries)  # type: ignore[arg-type, call-arg]
    q, k, v = _unpacked(q, k, v, queries)
    q, k, v = _adjacent(backend, q), _adjacent(backend, k), _adjacent(backend, v)
    b, n, h, d = q.shape
    fields = (
        ptr(dout), *_heads(q), *_heads(k), *_heads(v), ptr(out), ptr(lse), *_heads(dq), *_heads(dk), *_heads(dv),
        b, n, k.shape[1], h, d, scale, backend.codes[dtype],
    )  # fmt: skip
    launch(backend, backend.lib.attention_bwd, fields, device)
    return grads


def _adjacent(backend: NativeBackend, x: Tensor) -> Tensor:
    """Kernels read the elements of one head side by side; every other stride is free."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else contiguous(backend, x)


def _heads(x: Tensor) -> tuple[int, ...]:
    """The fields of a vit::Heads."""
    return (x.data_ptr(), *x.stride()[:3])


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keeps q, k, v, out and lse."""
    q, k, v, ctx.scale, _ = args
    ctx.save_for_backward(q, k, v, *outputs)


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    """dq, dk, dv."""
    q, k, v, out, lse = ctx.saved_tensors
    dq, dk, dv = kernel(dy, q, k, v, out, lse, ctx.scale)
    return dq, None if k is None else dk, None if v is None else dv, None, None


OP = Op(
    name="attention",
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
    autocasts=True,
)
