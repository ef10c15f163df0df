"""Rotary position embedding of queries or keys (Su et al., 2021, arXiv:2104.09864), with tables as timm makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import NativeBackend, Spec
from .bound import call
from .launch import contiguous, ptr
from .op import Op

#: Which two elements of a head turn together: neighbours (EVA-02, PE), or k and k + D / 2 (DINOv3, "rotate half").
PAIRINGS = ("interleaved", "half")


def rotary(x: Tensor, table: Tensor, prefix: int = 0, pairing: str = "interleaved", backend: str = "auto") -> Tensor:
    """Turns pairs of elements of each head by the angles of the token's position.

    y = x cos + r(x) sin, where r gives each pair (a, b) as (-b, a): elements 2k and 2k + 1 for "interleaved",
    k and k + D / 2 for "half". The first `prefix` tokens (class token, registers) stay as they are.

    x [B, N, H, D], any strides on B, N and H, D even. table holds the D sines in front of the D cosines of a position:
    [N - prefix, 2 D], per head [H, N - prefix, 2 D], or [B or 1, H or 1, N - prefix, 2 D] (timm's rope embeddings), in
    x's dtype or float32, with a gradient of its own. y [B, N, H, D], contiguous, in x's dtype; the sums are in float32
    or wider. Autocast changes nothing.
    Raises ValueError for sizes that do not fit, BackendError when the named backend cannot run it.
    """
    return call(OP, backend, x=x, table=table, prefix=prefix, pairing=pairing)


def reference(x: Tensor, table: Tensor, prefix: int = 0, pairing: str = "interleaved") -> Tensor:
    """The formula in PyTorch."""
    _check(x, table, prefix, pairing)
    rotated = x[:, prefix:].transpose(1, 2)  # [B, H, N - prefix, D], as the table is broadcast
    sin, cos = table.chunk(2, dim=-1)
    turned = (rotated * cos + _quarter_turn(rotated, pairing) * sin).to(x.dtype).transpose(1, 2)
    return torch.cat([x[:, :prefix], turned], dim=1) if prefix else turned.contiguous()


def _quarter_turn(x: Tensor, pairing: str) -> Tensor:
    """Each pair (a, b) of the last dimension as (-b, a)."""
    if pairing == "half":
        a, b = x.chunk(2, dim=-1)
        return torch.cat([-b, a], dim=-1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def limits(spec: Spec) -> list[str]:
    """None but those of the backend."""
    return []


def _check(x: Tensor, table: Tensor, prefix: int, pairing: str) -> None:
    """ValueError unless sizes and options go together."""
    if pairing not in PAIRINGS:
        raise ValueError(f"vit.ops.rotary: pairing must be 'interleaved' or 'half', got {pairing!r}")
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"vit.ops.rotary: x must be [B, N, H, D] with an even D, got {list(x.shape)}")
    b, n, h, d = x.shape
    if not 0 <= prefix <= n:
        raise ValueError(f"vit.ops.rotary: prefix must be within 0..{n}, the tokens of x, got {prefix}")
    lead = table.shape[:-2]
    fits = table.shape[-2:] == (n - prefix, 2 * d) and len(lead) <= 2
    if not fits or any(size not in (1, of) for size, of in zip(reversed(lead), (h, b), strict=False)):
        raise ValueError(
            f"vit.ops.rotary: table must be [{n - prefix}, {2 * d}] (N - prefix, 2 D), [H, N - prefix, 2 D] or "
            f"[B, H, N - prefix, 2 D] for x {list(x.shape)} and prefix {prefix}, got {list(table.shape)}"
        )


# ----- native


def arguments(x: Tensor, table: Tensor, prefix: int = 0, pairing: str = "interleaved") -> tuple[tuple[Any, ...], None]:
    """x, a table in its dtype or float32, prefix and pairing."""
    _check(x, table, prefix, pairing)
    if table.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"vit.ops.rotary: table must be {x.dtype} like x, or torch.float32, got {table.dtype}")
    return (x, table, prefix, pairing), None


FWD = "(Tensor x, Tensor table, int prefix, str pairing, bool save) -> Tensor y"
FWD_FIELDS = "x table y B N H D prefix pairing dtype param_dtype context"
BWD = "(Tensor dy, Tensor? x, Tensor table, int prefix, str pairing, bool[2] mask) -> (Tensor dx, Tensor dtable)"
BWD_FIELDS = "dy x table dx dtable B N H D table_B table_H prefix pairing dtype param_dtype context"


def fwd_fake(x: Tensor, table: Tensor, prefix: int, pairing: str, save: bool) -> Tensor:
    """y [B, N, H, D]."""
    return x.new_empty(x.shape)


def launch_fwd(backend: NativeBackend, x: Tensor, table: Tensor, prefix: int, pairing: str, save: bool) -> Tensor:
    """y [B, N, H, D]."""
    x, table = _adjacent(backend, x), _adjacent(backend, table)
    y = backend.empty(x.shape, x.dtype, x.device)
    kernel: Callable[..., None] = backend.lib.rotary_fwd  # mypy does not know how many numbers a shape has
    kernel(
        *_heads(x), *_positions(table), *_heads(y), *x.shape, prefix, backend.pairings[pairing],
        backend.codes[x.dtype], backend.codes[table.dtype], *backend.context(x.device),
    )  # fmt: skip
    return y


def bwd_fake(
    dy: Tensor, x: Tensor | None, table: Tensor, prefix: int, pairing: str, mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """dx [B, N, H, D], dtable like table."""
    return (
        dy.new_empty(dy.shape) if mask[0] else dy.new_empty(0),
        table.new_empty(table.shape) if mask[1] else dy.new_empty(0),
    )


def launch_bwd(
    backend: NativeBackend, dy: Tensor, x: Tensor | None, table: Tensor, prefix: int, pairing: str, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dx [B, N, H, D], dtable like table, each where `mask` wants it."""
    dy, table = _adjacent(backend, dy), _adjacent(backend, table)
    x = None if x is None else _adjacent(backend, x)
    dx = backend.empty(dy.shape, dy.dtype, dy.device) if mask[0] else None
    dtable = backend.empty(table.shape, table.dtype, table.device) if mask[1] else None
    kernel: Callable[..., None] = backend.lib.rotary_bwd  # mypy does not know how many numbers a shape has
    kernel(
        *_heads(dy), *_heads(x), *_positions(table), *_heads(dx), ptr(dtable), *dy.shape, *_lead(table), prefix,
        backend.pairings[pairing], backend.codes[dy.dtype], backend.codes[table.dtype], *backend.context(dy.device),
    )  # fmt: skip
    return dx, dtable


def _adjacent(backend: NativeBackend, x: Tensor) -> Tensor:
    """Kernels read the elements of one head side by side; every other stride is free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else contiguous(backend, x)


def _heads(x: Tensor | None) -> tuple[int, ...]:
    """The fields of a vit::Heads [B, N, H, D]."""
    return (0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3])


def _lead(table: Tensor) -> tuple[int, int]:
    """How many samples and heads have a table of their own: 1 where all share one."""
    batch, heads = (1, 1, *table.shape[:-2])[-2:]
    return batch, heads


def _positions(table: Tensor) -> tuple[int, int, int, int]:
    """The fields of a vit::Heads: strides of batch, token and head, 0 where there is one table for all."""
    batch, heads = (0 if size == 1 else table.stride(-4 + i) for i, size in enumerate(_lead(table)))
    return table.data_ptr(), batch, table.stride(-2), heads


def save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keeps the table; x where the table has a gradient."""
    x, table, ctx.prefix, ctx.pairing = args
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, table)


def backward(ctx: Any, kernel: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dtable."""
    x, table = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:2])
    grads = kernel(dy, x, table, ctx.prefix, ctx.pairing, mask)
    return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None, None


OP = Op(
    name="rotary",
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
