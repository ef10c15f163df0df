"""What is drawn of a model beside its attention: similar positions, filters of the patches, colours of the tokens.

Letters: B batch, N tokens, C embed_dim, P and Q sides of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.features import block_indices
from ..model.torch_layers import call
from ..model.vision_transformer import VisionTransformer
from .queries import placed_grid


@torch.no_grad()
def position_similarity(model: VisionTransformer) -> Tensor:
    """Cosines between the position embeddings of patches, [rows, columns, rows, columns] (arXiv:2010.11929, figure 7).

    Raises ValueError for a model without such embeddings: one that has rotary positions, or none.
    """
    table = model.pos_embed
    if table is None:
        rope = getattr(model.options, "rope_type", None) if getattr(model, "rope", None) is not None else None
        has = f"rotates queries and keys by their places (rope_type={rope!r})" if rope else "has no positions"
        raise ValueError(f"vit: {model.name} {has}: it has no position embedding to draw")
    if table.ndim == 4:  # NaFlexVit: [1, rows, columns, C]
        grid, patches = tuple(table.shape[1:3]), table.flatten(1, 2)[0]
    else:
        grid = model.patch_embed.grid_size
        patches = table[0, table.shape[1] - grid[0] * grid[1] :]
    patches = F.normalize(patches.double(), dim=-1)
    return (patches @ patches.t()).float().view(*grid, *grid)


@torch.no_grad()
def filter_components(model: VisionTransformer, count: int = 28) -> tuple[Tensor, Tensor]:
    """The first principal components of the filters that embed patches (arXiv:2010.11929, figure 7, left).

    -> components [count, in_chans, P, Q] of length 1, and the share of the filters' variance that each has [count];
    fewer where a patch has fewer numbers. The value of the largest size in a component is positive.

    Raises ValueError where the projection was replaced by one without such filters.
    """
    embed: Any = model.patch_embed
    try:
        filters = embed.filters().detach().cpu()
    except (AttributeError, RuntimeError):
        raise ValueError(f"vit: {model.name}: the patches' projection holds no filters of their size") from None
    _, components, shares = principal(filters.flatten(1), count)
    return components.view(-1, *filters.shape[1:]), shares


@torch.no_grad()
def token_colours(
    model: VisionTransformer, images: Sequence[Tensor], layer: int = -1, norm: bool = True
) -> list[Tensor]:
    """The first three principal components of patch tokens as red, green and blue (arXiv:2304.07193, figure 1).

    images: tensors [in_chans, height, width], of one or several sizes; -> for each [rows, columns, 3] from 0 to 1. The
    components are those of all images together, so that equal colours are similar tokens; each is stretched from its
    1st to its 99th percentile. layer: the block after which tokens are read; norm: whether through the last norm.
    """
    (wanted,) = block_indices([layer], len(model.blocks))
    found = []
    for image in images:
        batch = image[None]
        tokens, given = model.start(batch)
        for block, more in zip(model.blocks[: wanted + 1], given, strict=False):
            tokens = model._run(block, tokens, **more)
        tokens = call(model.ops, model.norm, tokens) if norm else tokens
        found.append((tokens[0, model.num_prefix_tokens :].cpu(), placed_grid(model, batch, tokens)))
    scores, _, _ = principal(torch.cat([tokens for tokens, _ in found]), 3)
    colours = torch.zeros(len(scores), 3, device="cpu")
    for i, values in enumerate(scores.t()):
        low, high = values.quantile(0.01), values.quantile(0.99)
        colours[:, i] = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    parts = colours.split([len(tokens) for tokens, _ in found])
    return [part.view(*grid, 3) for part, (_, grid) in zip(parts, found, strict=True)]


def principal(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """rows [n, m] -> scores [n, k], components [k, m] and shares of the variance [k], k = count or as many as there
    are. Computed in float64; the largest entry of a component is positive, so that its sign is not by chance."""
    centred = rows.double() - rows.double().mean(dim=0)
    left, values, components = torch.linalg.svd(centred, full_matrices=False)
    k = min(count, len(values))
    signs = torch.take_along_dim(components, components.abs().argmax(dim=1, keepdim=True), 1).sign()  # [min(n, m), 1]
    scores, components = left * values * signs.t(), components * signs
    shares = values**2 / (values**2).sum().clamp(min=1e-30)
    return scores[:, :k].float(), components[:k].float(), shares[:k].float()
