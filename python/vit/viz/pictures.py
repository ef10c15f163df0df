"""The pictures of `vit viz`: each function takes a model of vit.create and returns a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.features import block_indices
from ..model.vision_transformer import VisionTransformer
from .arrays import filter_components, position_similarity, token_colours
from .attention import attention_rows, rollout
from .queries import POOL, grid_of, tokens_of
from .sheet import COLOURS, FOOT, SMALL, colour_bar, label, overlay, seen, sheet, show

#: Panels side by side.
ACROSS = 7
#: Tiles of positions on each side; of larger grids as many are chosen, evenly.
TILES = 14


def draw_patches(model: VisionTransformer, images: Sequence[Any]) -> Any:
    """PIL images as the model sees them, and cut into its patches."""
    both = [seen(model, image) for image in images]
    figure, axes = sheet([_aspect(pixels) for _, pixels in both], 2, "")
    high, wide = model.patch_embed.patch_size
    for (whole, cut), (x, pixels) in zip(axes, both, strict=True):
        height, width = pixels.shape[:2]
        rows, columns = grid_of(model, x[None])
        show(whole, pixels)
        label(whole, f"{height} × {width} pixels")
        show(cut, pixels)
        thick = min(3.0, 0.15 * 72 * cut.get_position().width * figure.get_figwidth() / columns)
        lines: dict[str, Any] = {"color": "white", "linewidth": thick, "antialiased": False}
        cut.vlines(np.arange(1, columns) * wide, 0, height, **lines)
        cut.hlines(np.arange(1, rows) * high, 0, width, **lines)
        cut.set(xlim=(0, width), ylim=(height, 0))
        label(cut, f"{rows} × {columns} patches of {high} × {wide}")
    return figure


@torch.no_grad()
def draw_attention(
    model: VisionTransformer,
    images: Sequence[Any],
    layers: int | Sequence[int] | None = 1,
    heads: str | Sequence[int] = "all",
    query: int | str = "class",
) -> Any:
    """The attention of one query over PIL images: for each layer the mean of the heads and each head, or those chosen.

    layers, query: attention_rows'. heads: "all", "mean" or their numbers. Every panel is scaled to its own largest
    value, which stands below it, with the share that goes to the tokens before the patches.
    Raises ValueError for layers, heads and queries that the model lacks.
    """
    numbers = [-1] if query == POOL else block_indices(layers, len(model.blocks))
    groups: list[tuple[Tensor, np.ndarray, list[tuple[str, Tensor]]]] = []
    for image in images:
        x, pixels = seen(model, image)
        rows = attention_rows(model, x[None], None if query == POOL else numbers, query)
        groups += [(x, pixels, _chosen(row[0, :, 0].float().cpu(), heads, model)) for row in rows]
    panels = 1 + len(groups[0][2])
    columns = math.ceil(panels / math.ceil(panels / ACROSS))
    lines = math.ceil(panels / columns)
    place = "pooling layer" if query == POOL else ""
    place = place or (f"layer {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} layers")
    title = f"{model.name}, {place}: attention of {_named(query)}"
    aspects = [_aspect(pixels) for _, pixels, _ in groups for _ in range(lines)]
    figure, axes = sheet(aspects, columns, title, below=FOOT, bar=0.75)
    drawn: Any = None
    for i, (x, pixels, maps) in enumerate(groups):
        flat = [panel for line in axes[i * lines : (i + 1) * lines] for panel in line]
        show(flat[0], pixels)
        label(flat[0], f"layer {numbers[i % len(numbers)]}" if len(numbers) > 1 else "image")
        for panel, (name, row) in zip(flat[1:], maps, strict=False):
            drawn = _mapped(model, panel, x, pixels, row, name, query)
    _own_scale(figure, drawn)
    return figure


def draw_rollout(
    model: VisionTransformer,
    images: Sequence[Any],
    query: int | str = "class",
    fusion: str = "mean",
    discard: float = 0.0,
) -> Any:
    """Attention through all layers over PIL images: vit.viz.rollout, whose arguments these are."""
    found = []
    for image in images:
        x, pixels = seen(model, image)
        found.append((x, pixels, rollout(model, x[None], query, fusion, discard)[0].float().cpu()))
    title = f"{model.name}: attention rollout of {_named(query)}"
    figure, axes = sheet([_aspect(pixels) for _, pixels, _ in found], 2, title, below=FOOT, bar=0.75)
    drawn: Any = None
    without = f", without the smallest {100 * discard:g} %" if discard else ""
    for (whole, panel), (x, pixels, row) in zip(axes, found, strict=True):
        show(whole, pixels)
        label(whole, "image")
        drawn = _mapped(model, panel, x, pixels, row, f"{fusion} of the heads{without}", query)
    _own_scale(figure, drawn)
    return figure


def draw_posemb(model: VisionTransformer) -> Any:
    """Cosine similarity of the position embedding of each patch (a tile) with those of all patches."""
    cosines = position_similarity(model).numpy()
    rows, columns = cosines.shape[:2]
    picked = [np.unique(np.linspace(0, side - 1, min(side, TILES)).round().astype(int)) for side in (rows, columns)]
    gap = max(1, round(max(rows, columns) / 14))
    canvas = np.full((len(picked[0]) * (rows + gap) - gap, len(picked[1]) * (columns + gap) - gap), np.nan, np.float32)
    for i, row in enumerate(picked[0]):
        for j, column in enumerate(picked[1]):
            y, x = i * (rows + gap), j * (columns + gap)
            canvas[y : y + rows, x : x + columns] = cosines[row, column]
    aspect = canvas.shape[0] / canvas.shape[1]
    figure, ((axes,),) = sheet([aspect], 1, "", below=0.35, bar=0.75, left=0.4, panel=4.2)
    drawn = axes.imshow(canvas, cmap=COLOURS, vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_axis_on()
    axes.set_xticks(np.arange(len(picked[1])) * (columns + gap) + (columns - 1) / 2, picked[1], fontsize=SMALL)
    axes.set_yticks(np.arange(len(picked[0])) * (rows + gap) + (rows - 1) / 2, picked[0], fontsize=SMALL)
    axes.set_xlabel("column of the patch", fontsize=SMALL + 1)
    axes.set_ylabel("row of the patch", fontsize=SMALL + 1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    label(axes, f"{model.name}: similarity of position embeddings")
    colour_bar(figure, drawn, "cosine", (-1, 0, 1), ("−1", "0", "1"))
    return figure


def draw_filters(model: VisionTransformer, count: int = 28) -> Any:
    """The first principal components of the filters that embed patches, each scaled to its own largest value."""
    components, shares = filter_components(model, count)
    columns = min(ACROSS, len(components))
    lines = math.ceil(len(components) / columns)
    high, wide = components.shape[2:]
    title = (
        f"{model.name}: principal components of the patch filters, {100 * float(shares.sum()):.1f} % of their variance"
    )
    figure, axes = sheet([high / wide] * lines, columns, title, panel=0.9)
    flat = [panel for line in axes for panel in line]
    for i, (panel, component) in enumerate(zip(flat, components, strict=False)):
        colours = component if len(component) == 3 else component.mean(dim=0, keepdim=True).expand(3, -1, -1)
        show(panel, (0.5 + colours / (2 * colours.abs().max().clamp(min=1e-12))).permute(1, 2, 0).numpy())
        label(panel, f"{i + 1}: {100 * float(shares[i]):.1f} %")
    return figure


def draw_features(model: VisionTransformer, images: Sequence[Any], layer: int = -1) -> Any:
    """PIL images beside the first three principal components of their patch tokens after a block, as colours."""
    both = [seen(model, image) for image in images]
    colours = token_colours(model, [x for x, _ in both], layer)
    (number,) = block_indices([layer], len(model.blocks))
    title = f"{model.name}: principal components of the tokens after layer {number}"
    figure, axes = sheet([_aspect(pixels) for _, pixels in both], 2, title)
    high, wide = model.patch_embed.patch_size
    for (whole, panel), (_, pixels), colour in zip(axes, both, colours, strict=True):
        height, width = pixels.shape[:2]
        rows, columns = colour.shape[:2]
        show(whole, pixels)
        label(whole, "image")
        extent = (0, columns * wide, rows * high, 0)
        panel.imshow(colour.numpy(), extent=extent, interpolation="nearest", aspect="auto")
        panel.set(xlim=(0, width), ylim=(height, 0))
        label(panel, "components 1, 2, 3 as red, green, blue")
    return figure


def _chosen(rows: Tensor, heads: str | Sequence[int], model: Any) -> list[tuple[str, Tensor]]:
    """Names and rows [N] of the panels, of the heads' rows [H, N]."""
    mean = [("mean of the heads", rows.mean(dim=0))]
    if heads == "mean":
        return mean
    if heads == "all":
        return mean + [(f"head {i}", row) for i, row in enumerate(rows)]
    if not heads or isinstance(heads, str) or not all(-len(rows) <= i < len(rows) for i in heads):
        raise ValueError(f"vit: heads={heads!r}: {model.name} has the heads 0 to {len(rows) - 1}; or 'all', or 'mean'")
    return [(f"head {i % len(rows)}", rows[i]) for i in heads]


def _mapped(model: Any, panel: Any, x: Tensor, pixels: np.ndarray, row: Tensor, name: str, query: int | str) -> Any:
    """One map over its image, from a row of all tokens [N]."""
    grid, prefix, patch = grid_of(model, x[None]), model.num_prefix_tokens, model.patch_embed.patch_size
    values = row[prefix:].view(grid).numpy()
    drawn = overlay(panel, pixels, values, patch)
    below = f"max {100 * float(values.max()):.2g} %"
    if prefix:
        below += f", prefix {100 * float(row[:prefix].sum() / row.sum()):.0f} %"
    label(panel, name, below)
    if isinstance(query, int) or query.startswith("patch:"):
        place = tokens_of(model, [query], grid)[0] - prefix
        if place >= 0:
            _outline(panel, divmod(place, grid[1]), patch)
    return drawn


def _outline(panel: Any, place: tuple[int, int], patch: tuple[int, int]) -> None:
    top, left = place[0] * patch[0], place[1] * patch[1]
    xs = [left, left + patch[1], left + patch[1], left, left]
    ys = [top, top, top + patch[0], top + patch[0], top]
    panel.plot(xs, ys, color="black", linewidth=2.2)
    panel.plot(xs, ys, color="white", linewidth=1.0)


def _own_scale(figure: Any, drawn: Any) -> None:
    colour_bar(figure, drawn, "share of the attention", (0.0, drawn.get_clim()[1]), ("0", "max"))


def _named(query: int | str) -> str:
    names = {"class": "the class token", "distillation": "the distillation token", POOL: "the pooling query"}
    names["mean"] = "the mean of the patches"
    if isinstance(query, int):
        return f"token {query}"
    kind, _, place = query.partition(":")
    return names.get(query, f"the patch {place}" if kind == "patch" else f"{kind} {place}")


def _aspect(pixels: np.ndarray) -> float:
    return pixels.shape[0] / pixels.shape[1]
