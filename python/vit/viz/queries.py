"""Whose attention is looked at: tokens of a model by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: The query of a model that pools by attention, which is no token.
POOL = "pool"
#: Of a rollout: the mean over the patches, as a model that pools by the mean reads them.
MEAN = "mean"


class QueryError(ValueError):
    """A query that the model does not have; the text says which it has."""


def grid_of(model: Any, images: Any) -> tuple[int, int]:
    """Rows and columns of patches of these images."""
    rows, columns = model.patch_embed.grid_of(images)
    return int(rows), int(columns)


def placed_grid(model: Any, images: Any, tokens: Any) -> tuple[int, int]:
    """grid_of; ValueError where dropped patches leave no grid among tokens [B, N, C]."""
    rows, columns = grid_of(model, images)
    left = tokens.shape[1] - model.num_prefix_tokens
    if left != rows * columns:
        raise ValueError(
            f"vit: {left} of {rows} x {columns} patches are left (patch_drop_rate), so that none has its place; "
            "use model.eval()"
        )
    return rows, columns


def tokens_of(model: Any, queries: Sequence[int | str], grid: tuple[int, int], *more: str) -> list[int]:
    """The places of queries among the tokens: class, distillation and registers stand before the patches. more: what
    else would have been allowed."""
    return [_token(model, query, grid, more) for query in queries]


def allowed(model: Any, grid: tuple[int, int], *more: str) -> str:
    """The queries of a model in words."""
    names = list(_prefix(model))
    last = f"register:{model.num_reg_tokens - 1}"
    if last in names and model.num_reg_tokens > 2:
        names = [name for name in names if not name.startswith("register:")] + [f"register:0 to {last}"]
    names.append(f"patch:ROW,COLUMN of {grid[0]} x {grid[1]}")
    return ", ".join([*names, *([POOL] if model.attn_pool is not None else []), *more])


def _token(model: Any, query: int | str, grid: tuple[int, int], more: Sequence[str]) -> int:
    prefix = _prefix(model)
    count = len(prefix) + grid[0] * grid[1]
    if isinstance(query, int) and not isinstance(query, bool):
        if 0 <= query < count:
            return query
        raise QueryError(f"vit: {model.name} has no token {query}; it has 0 to {count - 1}")
    if query in prefix:
        return prefix.index(query)
    kind, _, place = str(query).partition(":")
    if kind == "patch":
        row, column = _place(place, grid, model)
        return len(prefix) + row * grid[1] + column
    what = {"class": "class token", "register": "such register", "distillation": "distillation token"}.get(kind)
    problem = f"has no {what}" if what else f"has no query {query!r}"
    raise QueryError(f"vit: {model.name} {problem}; allowed: {allowed(model, grid, *more)}")


def _prefix(model: Any) -> list[str]:
    """Names of the tokens before the patches, in their order."""
    names = ["class"] if model.has_class_token else []
    if model.num_prefix_tokens > len(names) + model.num_reg_tokens:
        names.append("distillation")
    return names + [f"register:{i}" for i in range(model.num_reg_tokens)]


def _place(text: str, grid: tuple[int, int], model: Any) -> tuple[int, int]:
    words = text.split(",")
    try:
        row, column = (int(word) for word in words)
    except ValueError:
        raise QueryError(f"vit: the query 'patch:{text}' is no patch:ROW,COLUMN, such as patch:0,3") from None
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        last = f"patch:{grid[0] - 1},{grid[1] - 1}"
        raise QueryError(f"vit: {model.name} has no patch:{text}; its patches are patch:0,0 to {last}")
    return row, column
