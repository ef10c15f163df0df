"""Scaled dot-product attention (Vaswani et al., 2017, arXiv:1706.03762) without a score matrix in memory
(Dao et al., 2022, arXiv:2205.14135)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..backends import DTYPE_CODES, NativeBackend, Spec
from .op import Op, acc_dtype, autocast_dtype, call, launch, ptr

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
    is the packed projection [B, N, 3, H, D] itself, and so is its gradient, which then needs no copy. `queries`: only
    so many tokens ask, the first ones: out [B, queries, H, D].
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
    _check(q, k, v, queries)
    q, k, v = (t.transpose(1, 2) for t in _unpacked(q, k, v, queries))  # [B, H, N, D]
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def limits(spec: Spec) -> list[str]:
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
    return ", ".join(f"{name} {list(t.shape)}" for name, t in (("q", q), ("k", k), ("v", v)) if t is not None)


def _unpacked(q: Tensor, k: Tensor | None, v: Tensor | None, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, queries, H, D] and k, v [B, N, H, D]: as given, or views of a packed q [B, N, 3, H, D]."""
    if k is None or v is None:
        q, k, v = q.unbind(2)
    return (q if queries is None else q[:, :queries]), k, v


FWD = "(Tensor q, Tensor? k, Tensor? v, float scale, int? queries, bool save) -> (Tensor out, Tensor lse)"
BWD = (
    "(Tensor dout, Tensor q, Tensor? k, Tensor? v, Tensor out, Tensor lse, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)


def fwd_fake(
    q: Tensor, k: Tensor | None, v: Tensor | None, scale: float, queries: int | None, save: bool
) -> tuple[Tensor, Tensor]:
    q, _, _ = _unpacked(q, k, v, queries)
    return q.new_empty(q.shape), _new_lse(q) if save else q.new_empty(0)


def _new_lse(q: Tensor) -> Tensor:
    b, n, h, _ = q.shape
    return q.new_empty((b, h, n), dtype=acc_dtype(q.dtype))


def fwd(
    backend: NativeBackend, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float, queries: int | None, save: bool
) -> tuple[Tensor, Tensor | None]:
    q, k, v = map(_heads, _unpacked(q, k, v, queries))
    out, lse = backend.empty(q.shape, q.dtype, q.device), _new_lse(q) if save else None
    sizes = _sizes(q, k, v)
    code, context = DTYPE_CODES[q.dtype], backend.context(q.device)

    pointers = (ptr(q), ptr(k), ptr(v), ptr(out), ptr(lse))
    values = (*sizes, scale, code, *context)
    launch(backend, backend.lib.attention_fwd, backend.lib.attention_fwd_workspace, pointers, values, q.device)
    return out, lse


def bwd_fake(
    dout: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if k is None or v is None:
        return q.new_empty(q.shape), q.new_empty(0), q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def bwd(
    backend: NativeBackend,
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor | None, ...]:
    queries = dout.shape[1]
    # Tokens that did not ask have gradients of zero, which no kernel writes.
    new = backend.empty if queries == q.shape[1] else backend.zeros
    grads = tuple(None if t is None else new(t.shape, t.dtype, t.device) for t in (q, k, v))
    dq, dk, dv = _unpacked(*grads, queries)  # type: ignore[arg-type, call-arg]
    q, k, v = map(_heads, _unpacked(q, k, v, queries))
    sizes = *_sizes(q, k, v), *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3]
    code, context = DTYPE_CODES[q.dtype], backend.context(q.device)

    pointers = (ptr(dout), ptr(q), ptr(k), ptr(v), ptr(out), ptr(lse), ptr(dq), ptr(dk), ptr(dv))
    values = (*sizes, scale, code, *context)
    launch(backend, backend.lib.attention_bwd, backend.lib.attention_bwd_workspace, pointers, values, q.device)
    return grads


def _heads(t: Tensor) -> Tensor:
    """Kernels read the elements of one head side by side; every other stride is free."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    b, n, h, d = q.shape
    return b, n, k.shape[1], h, d, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.scale, _ = args
    ctx.save_for_backward(q, k, v, *outputs)


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    dq, dk, dv = kernel(dy, q, k, v, out, lse, ctx.scale)
    return dq, None if k is None else dk, None if v is None else dv, None, None


OP = Op("attention", reference, arguments, FWD, fwd_fake, fwd, BWD, bwd_fake, bwd, save, backward, limits)
