"""Where a model looks: rows of its attention, and their product over the layers.

Letters: B batch, N tokens, H heads, Q queries, C embed_dim, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.features import block_indices
from ..model.rows import attention_rows_of
from ..model.torch_layers import call
from ..model.vision_transformer import VisionTransformer
from .queries import MEAN, POOL, QueryError, allowed, grid_of, placed_grid, tokens_of

#: Ways to make one matrix of the heads' -> along dimension 1 of [B, H, Q, N].
FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda rows: rows.mean(dim=1),
    "max": lambda rows: rows.amax(dim=1),
    "min": lambda rows: rows.amin(dim=1),
}

#: Queries -> the rows of a layer [B, H, Q, N].
RowsOf = Callable[[Sequence[int]], Tensor]

#: Probabilities that exist at once in a rollout, unless one row is longer: 256 MiB in float32.
AT_ONCE = 1 << 26


def attention_rows(
    model: VisionTransformer,
    images: Tensor,
    layers: int | Sequence[int] | None = None,
    queries: int | str | Sequence[int | str] = "class",
) -> list[Tensor]:
    """softmax(scale q k^T) of chosen queries: images [B, in_chans, height, width] -> for each layer [B, H, Q, N].

    layers: the last n (int), those (sequence, negative from the end) or all (None), in rising order. queries: one or
    several of "class", "distillation", "register:I", "patch:ROW,COLUMN" or the number of a token; alone, "pool" is the
    learned query of a model that pools by attention: one entry [B, H, 1, N], 0 at tokens that are not pooled. The N
    tokens are the class token, registers, then patches in reading order; q and k are those after norms and rotation.

    Only these rows are computed, by vit.ops.attention_rows on the model's backend: Q N numbers of a head, never N N.
    The blocks run as they always do, on the backends of model.plan, and those after the last layer asked for not at
    all; the model is left as it is, in its mode. Rows of half precision are float32. Where autograd is on they have
    gradients, and are computed in PyTorch.

    Raises ValueError for layers and queries that the model lacks (which says those it has), TypeError for blocks that
    are none of vit's, BackendError where the model's backend was named and has no attention_rows.
    """
    _check(model)
    chosen = [queries] if isinstance(queries, (int, str)) else list(queries)
    if chosen == [POOL]:
        return [_pool_row(model, model.forward_features(images), images)]
    wanted = block_indices(layers, len(model.blocks))
    tokens, given = model.start(images)
    index = _tokens(model, chosen, images, tokens)
    rows: list[Tensor] = []
    for i, block in enumerate(model.blocks[: wanted[-1] + 1]):
        if i in wanted:
            rows.append(_probabilities(model, block)(tokens, index, **given[i]))
        if i < wanted[-1]:
            tokens = model._run(block, tokens, **given[i])
    return rows


@torch.no_grad()
def rollout(
    model: VisionTransformer,
    images: Tensor,
    query: int | str = "class",
    fusion: str = "mean",
    discard: float = 0.0,
) -> Tensor:
    """How much of each token reaches a query through all layers (Abnar and Zuidema, arXiv:2005.00928, equation 1):

        rollout = row of the query in A_L ... A_2 A_1,   A_i = rows of (fused heads of layer i + identity), each sum 1

    images [B, in_chans, height, width] -> [B, N], each row with the sum 1. query: one of attention_rows'; "pool" begins
    with the row of the pooling layer, "mean" with the mean of the patches. fusion: "mean", "max" or "min" of the heads.
    discard: the share of the smallest entries of each layer's fused matrix that become zero (0: none, as published).

    The row goes through the layers from the last to the first, so that no product of matrices is made. Memory: the
    input of every layer, L B N C numbers; at most 2^26 probabilities at a time (256 MiB); with `discard` one fused
    matrix B N N, of one layer at a time.

    Raises ValueError for a query that the model lacks and for an unknown fusion or share.
    """
    _check(model)
    if fusion not in FUSIONS:
        raise ValueError(f"vit: fusion={fusion!r} is not one of {', '.join(map(repr, FUSIONS))}")
    if not 0.0 <= discard < 1.0:
        raise ValueError(f"vit: discard must be at least 0 and below 1, got {discard!r}")
    tokens, given = model.start(images)
    row = None if query == POOL else _first_row(model, query, images, tokens)
    inputs = []
    for block, more in zip(model.blocks, given, strict=True):
        inputs.append(tokens)
        tokens = model._run(block, tokens, **more)
    if row is None:
        row = FUSIONS[fusion](_pool_row(model, call(model.ops, model.norm, tokens), images))[:, 0]
        row = row / row.sum(dim=-1, keepdim=True)
    for block, more in zip(reversed(list(model.blocks)), reversed(given), strict=True):
        rows_of = functools.partial(_probabilities(model, block), inputs.pop(), **more)
        row = _through(rows_of, getattr(block.attn, "num_heads", 1), row, fusion, discard)
    return row


def _through(rows_of: RowsOf, heads: int, row: Tensor, fusion: str, discard: float) -> Tensor:
    """row [B, N] times the matrix of a layer."""
    parts = _fused(rows_of, heads, fusion, row, everything=bool(discard))
    if discard:
        parts = _discarded(parts, discard)
    result = torch.zeros_like(row)
    for index, part in parts:
        part[:, torch.arange(len(index), device=row.device), index] += 1.0
        part /= part.sum(dim=-1, keepdim=True)
        result += (row[:, None, index] @ part.to(row.dtype))[:, 0]
    return result


def _fused(rows_of: RowsOf, heads: int, fusion: str, row: Tensor, everything: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens, and their rows of the fused heads [B, Q, N], a few at a time; without `everything` of those alone whose
    share in `row` is not 0."""
    chosen = torch.arange(row.shape[1], device=row.device)
    if not everything:
        chosen = chosen[(row != 0).any(dim=0)]
    for index in chosen.split(max(1, AT_ONCE // (row.numel() * heads))):
        yield index, FUSIONS[fusion](rows_of(index.tolist()))


def _discarded(parts: Iterator[tuple[Tensor, Tensor]], share: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole matrix in one part, its smallest entries zero."""
    indices, rows = zip(*parts, strict=True)
    fused = torch.cat(rows, dim=1)
    flat = fused.flatten(1)
    smallest = flat.topk(int(share * flat.shape[1]), largest=False).indices
    flat.scatter_(1, smallest, 0.0)
    yield torch.cat(indices), fused


def _first_row(model: Any, query: int | str, images: Tensor, tokens: Tensor) -> Tensor:
    """What a rollout begins with: 1 at the query, or the mean of the patches."""
    row = torch.zeros(tokens.shape[:2], dtype=torch.promote_types(tokens.dtype, torch.float32), device=tokens.device)
    if query == MEAN:
        row[:, model.num_prefix_tokens :] = 1.0 / (tokens.shape[1] - model.num_prefix_tokens)
    else:
        row[:, _tokens(model, [query], images, tokens, MEAN)] = 1.0
    return row


def _pool_row(model: Any, tokens: Tensor, images: Tensor) -> Tensor:
    """The pooling layer's probabilities of normed tokens [B, N, C]: [B, H, 1, N]."""
    if model.attn_pool is None:
        problem = f"vit: {model.name} does not pool by attention (global_pool={model.global_pool!r})"
        raise QueryError(f"{problem}; allowed: {allowed(model, grid_of(model, images))}")
    skip = 0 if model.pools_prefix or model.pool_include_prefix else model.num_prefix_tokens
    pool = model.attn_pool
    rows = pool.probabilities(tokens[:, skip:], attention_rows_of(model, pool.head_dim))
    return torch.nn.functional.pad(rows, (skip, 0))


def _tokens(model: Any, queries: Sequence[int | str], images: Tensor, tokens: Tensor, *more: str) -> list[int]:
    if POOL in queries:
        raise QueryError(f"vit: the query {POOL!r} is of another layer than the blocks: it stands alone")
    return tokens_of(model, queries, placed_grid(model, images, tokens), *more)


def _probabilities(model: Any, block: Any) -> Callable[..., Tensor]:
    """(input of the block, queries, what else it is given) -> rows [B, H, Q, N]."""
    if not hasattr(block, "probabilities") or not hasattr(getattr(block, "attn", None), "probabilities"):
        inner = getattr(block, "attn", block)
        raise TypeError(f"vit: attention of {type(block).__name__} with {type(inner).__name__} is not known to vit.viz")
    return functools.partial(block.probabilities, rows=attention_rows_of(model, block.attn.head_dim))


def _check(model: Any) -> None:
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"vit: attention is read from a model of vit.create, got {type(model).__name__}")
