"""Scaled dot-product attention (Vaswani et al., 2017, arXiv:1706.03762) without a score matrix in memory
(Dao et al., 2022, arXiv:2205.14135)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import NativeBackend, Spec
from .bound import call
from .launch import acc_dtype, autocast_dtype, contiguous, launch, zeros
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
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Replaces each query by the mean of the values, weighted by the softmax of its scaled products with the keys.

    out[b, n, h] = sum_l softmax_l(scale q[b, n, h] . k[b, l, h]) v[b, l, h], scale = 1 / sqrt(D) unless given.

    q [B, N, H, D]; k, v [B, L, H, D], L >= 1, any strides on B, N (L) and H, so that views of a packed projection
    are read in place; out [B, N, H, D], contiguous. Under autocast all three are cast to its dtype. Without k and v, q
    is the packed projection [B, N, 3, H, D] itself, and so is its gradient, which then needs no copy. `queries`:
    the output for the first `queries` tokens only, out [B, queries, H, D]; all tokens are keys.
    `lengths`: B is 1, and the N tokens are those of several images, one behind another, lengths[i] of image i; a token
    sees those of its own image, every image has the very results of its own call, and `queries` of each are computed.
    Raises ValueError for sizes or dtypes that do not fit, BackendError when the named backend cannot run it.
    """
    return call(OP, backend, q=q, k=k, v=v, scale=scale, queries=queries, lengths=lengths)


def reference(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    scale: float | None = None,
    queries: int | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """The formula in PyTorch."""
    _check(q, k, v, queries, lengths)
    if lengths is not None:
        images: Any = zip(*(_split(t, lengths) for t in (q, k, v)), strict=True)
        return torch.cat([reference(a, b, c, scale, queries) for a, b, c in images], dim=1)
    q, k, v = (t.transpose(1, 2) for t in _unpacked(q, k, v, queries))  # [B, H, N, D]
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _split(x: Tensor | None, lengths: Sequence[int]) -> Sequence[Tensor | None]:
    """The tokens of each image."""
    return [None] * len(lengths) if x is None else x.split(list(lengths), dim=1)


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
    lengths: Sequence[int] | None = None,
) -> tuple[tuple[Any, ...], None]:
    """q, k, v of one dtype, or a packed q alone; the scale; how many queries; the lengths."""
    _check(q, k, v, queries, lengths)
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
    return (q, k, v, scale, queries, None if lengths is None else list(lengths)), None


def _check(
    q: Tensor, k: Tensor | None, v: Tensor | None, queries: int | None, lengths: Sequence[int] | None = None
) -> None:
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
    if lengths is not None:
        _check_lengths(q, k, v, lengths)
    tokens = q.shape[1] if lengths is None else min(lengths)
    if queries is not None and not 1 <= queries <= tokens:
        of = "q" if lengths is None else "the shortest image"
        raise ValueError(
            f"vit.ops.attention: queries must be within 1..{tokens}, the tokens of {of}, got {queries}; "
            "None stands for all"
        )


def _check_lengths(
    q: Tensor, k: Tensor | None, v: Tensor | None, lengths: Sequence[int], op: str = "vit.ops.attention"
) -> None:
    """ValueError or TypeError unless they say of every token to which image it belongs."""
    if not isinstance(lengths, (list, tuple)) or any(
        isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in lengths
    ):
        kind = type(lengths).__name__
        hint = "; use lengths.tolist()" if hasattr(lengths, "tolist") else ""
        given = repr(lengths) if isinstance(lengths, (list, tuple, str)) else f"a {kind}"
        raise TypeError(f"{op}: lengths must be a list or tuple of integers, got {given}{hint}")
    if q.shape[0] != 1 or (k is not None and k.shape[1] != q.shape[1]):
        raise ValueError(
            f"{op}: with lengths q, k and v are [1, N, H, D], the tokens of all images one behind another, "
            f"got {_shapes(q, k, v)}"
        )
    for i, n in enumerate(lengths):
        if n < 1:
            raise ValueError(f"{op}: lengths must be positive, got {n} at position {i}")
    if sum(lengths) != q.shape[1] or not lengths:
        raise ValueError(f"{op}: lengths {list(lengths)} sum up to {sum(lengths)}, and q has {q.shape[1]} tokens")


def _shapes(q: Tensor, k: Tensor | None, v: Tensor | None) -> str:
    """For error texts."""
    return ", ".join(f"{name} {list(t.shape)}" for name, t in (("q", q), ("k", k), ("v", v)) if t is not None)


def _unpacked(q: Tensor, k: Tensor | None, v: Tensor | None, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, queries, H, D] and k, v [B, N, H, D]: as given, or views of a packed q [B, N, 3, H, D]."""
    if k is None or v is None:
        q, k, v = q.unbind(2)
    return (q if queries is None else q[:, :queries]), k, v


FWD = (
    "(Tensor q, Tensor? k, Tensor? v, float scale, int? queries, SymInt[]? lengths, bool save)"
    " -> (Tensor out, Tensor stats)"
)
FWD_FIELDS = "q k v out stats B N L H D scale dtype workspace context"
BWD = (
    "(Tensor dout, Tensor q, Tensor? k, Tensor? v, Tensor out, Tensor stats, float scale, SymInt[]? lengths)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)
BWD_FIELDS = "dout q k v out stats dq dk dv B N L H D scale dtype workspace context"


def fwd_fake(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    scale: float,
    queries: int | None,
    lengths: Sequence[int] | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, queries or N, H, D], with lengths [1, queries of all images, H, D]; stats [B, H, 2, the same]."""
    out = q.new_empty(_out_shape(q if k is not None else q[:, :, 0], queries, lengths))
    return out, _new_stats(out) if save else q.new_empty(0)


def _out_shape(q: Tensor, queries: int | None, lengths: Sequence[int] | None) -> tuple[int, ...]:
    b, n, h, d = q.shape
    return b, n if queries is None else queries if lengths is None else queries * len(lengths), h, d


def _new_stats(out: Tensor) -> Tensor:
    """Memory for the largest score and the inverse sum of every softmax: [B, H, 2, N]; with lengths those of one image,
    [H, 2, n], behind those of another."""
    b, n, h, _ = out.shape
    return out.new_empty((b, h, 2, n), dtype=acc_dtype(out.dtype))


def _calls(
    q: Tensor, k: Tensor, queries: int | None, lengths: Sequence[int] | None
) -> Iterator[tuple[int, int, int, int, int, int | None]]:
    """The calls of the kernel, one for neighbouring images of one length: how many images, the first token and the
    first row of out, the queries and the keys of each, and how many tokens lie between two (None: as the strides say).
    """
    if lengths is None:
        yield q.shape[0], 0, 0, q.shape[1] if queries is None else queries, k.shape[1], None
        return
    token = row = 0
    for length, run in itertools.groupby(lengths):
        images, own = len(list(run)), length if queries is None else queries
        yield images, token, row, own, length, length
        token, row = token + images * length, row + images * own


def launch_fwd(
    backend: NativeBackend,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    scale: float,
    queries: int | None,
    lengths: Sequence[int] | None,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """out [B, queries or N, H, D]; stats [B, H, 2, queries or N] to be saved."""
    q, k, v = _unpacked(q, k, v, None)
    q, k, v = _adjacent(backend, q), _adjacent(backend, k), _adjacent(backend, v)
    dtype, device, (h, d) = q.dtype, q.device, q.shape[2:]
    out = backend.empty(_out_shape(q, queries, lengths), dtype, device)
    stats = _new_stats(out) if save else None
    for images, token, row, own, keys, step in _calls(q, k, queries, lengths):
        fields = (
            *_heads(q, token, step), *_heads(k, token, step), *_heads(v, token, step), _row(out, row * h * d),
            _row(stats, row * 2 * h), images, own, keys, h, d, scale, backend.codes[dtype],
        )  # fmt: skip
        launch(backend, backend.lib.attention_fwd, fields, device)
    return out, stats


def bwd_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    stats: Tensor,
    scale: float,
    lengths: Sequence[int] | None,
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
    stats: Tensor,
    scale: float,
    lengths: Sequence[int] | None,
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv like q, k, v, all three; of a packed q one gradient."""
    dout = contiguous(backend, dout)
    rows, dtype, device = dout.shape[1], q.dtype, q.device

    def gradient(x: Tensor) -> Tensor:
        if rows == q.shape[1]:
            return backend.empty(x.shape, dtype, device)
        return zeros(backend, x.shape, dtype, device)  # of the other tokens, which no kernel writes

    grads = tuple(None if t is None else gradient(t) for t in (q, k, v))
    queries = None if rows == q.shape[1] else rows if lengths is None else rows // len(lengths)
    dq, dk, dv = _unpacked(*grads, None)  # type: ignore[arg-type, call-arg]
    q, k, v = _unpacked(q, k, v, None)
    q, k, v = _adjacent(backend, q), _adjacent(backend, k), _adjacent(backend, v)
    h, d = q.shape[2:]
    for images, token, row, own, keys, step in _calls(q, k, queries, lengths):
        read = (x for t in (q, k, v) for x in _heads(t, token, step))
        written = (x for t in (dq, dk, dv) for x in _heads(t, token, step))
        fields = (
            _row(dout, row * h * d), *read, _row(out, row * h * d), _row(stats, row * 2 * h), *written,
            images, own, keys, h, d, scale, backend.codes[dtype],
        )  # fmt: skip
        launch(backend, backend.lib.attention_bwd, fields, device)
    return grads


def _adjacent(backend: NativeBackend, x: Tensor) -> Tensor:
    """Kernels read the elements of one head side by side; every other stride is free."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else contiguous(backend, x)


def _heads(x: Tensor, token: int, step: int | None) -> tuple[int, ...]:
    """The fields of a vit::Heads that begins at a token; step: tokens from one image to the next, None: any stride."""
    batch, stride, head = x.stride()[:3]
    first = x.data_ptr() + token * stride * x.element_size()
    return first, batch if step is None else step * stride, stride, head


def _row(x: Tensor | None, elements: int) -> int:
    """The address of an element of a contiguous tensor; 0 stands for "not given"."""
    return 0 if x is None else x.data_ptr() + elements * x.element_size()


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keeps q, k, v, out and stats."""
    q, k, v, ctx.scale, _, ctx.lengths = args
    ctx.save_for_backward(q, k, v, *outputs)


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    """dq, dk, dv."""
    q, k, v, out, stats = ctx.saved_tensors
    dq, dk, dv = kernel(dy, q, k, v, out, stats, ctx.scale, ctx.lengths)
    return dq, None if k is None else dk, None if v is None else dv, None, None, None


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
