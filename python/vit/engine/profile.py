"""Where the time of an engine's calls goes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from . import native


@dataclass(frozen=True)
class Phase:
    """A part of the forward: its seconds per call on the first thread, its share of the call, and the floating-point
    operations all threads do in it."""

    name: str
    seconds: float
    share: float
    flops: int


@contextmanager
def timed(library: native.Library, handle: int) -> Iterator[dict[str, float]]:
    """A dict that holds, after the block, the seconds that forwards in the block spent in each phase."""
    seconds: dict[str, float] = {}
    library.check(library.profile(handle, 1))
    try:
        yield seconds
        names = library.phases()
        values = (ctypes.c_double * len(names))()
        library.check(library.profile_read(handle, values))
        seconds.update(zip(names, values, strict=True))
    finally:
        library.profile(handle, 0)


def phases(seconds: dict[str, float], calls: int, work: dict[str, int]) -> list[Phase]:
    """Phases of one call out of `calls`, with the operations of each."""
    total = sum(seconds.values()) or 1.0
    return [Phase(name, spent / calls, spent / total, work.get(name, 0)) for name, spent in seconds.items()]


def patches_of(c: native.Config) -> int:
    """Patches of an image."""
    sides = ((c.image_height, c.patch_height), (c.image_width, c.patch_width))
    rows, columns = (size // patch if c.drop_edge else -(-size // patch) for size, patch in sides)
    return rows * columns


def flops(c: native.Config, batch: int) -> dict[str, int]:
    """Floating-point operations of the phases of a forward."""
    patches = patches_of(c)
    N = c.prefix_tokens + patches
    rows = 2 * batch * N * c.depth
    # Where pooling takes the class token, the last block computes only that one from its queries on.
    late = rows - (2 * batch * (N - 1) if c.pool == native.POOLS["token"] else 0)
    heads = N if c.pool == native.POOLS[""] else 1
    values = c.channels * c.patch_height * c.patch_width
    made = 2 * c.mlp_width if c.gated else c.mlp_width
    pool = 0
    if c.pool == native.POOLS["map"]:
        pooled = patches + c.prefix_tokens * c.pool_prefix
        pool = 2 * c.embed_dim * (2 * pooled * c.pool_heads + 2 * c.embed_dim + 2 * c.pool_mlp_width)
    read = 2 * c.embed_dim if c.pool == native.POOLS["distilled"] else c.embed_dim
    return {
        "embed": 2 * batch * patches * values * c.embed_dim,
        "qkv": (2 * rows + late) * c.embed_dim**2,
        "attention": 2 * late * N * c.embed_dim,
        "proj": late * c.embed_dim**2,
        "fc1": late * c.embed_dim * made,
        "fc2": late * c.embed_dim * c.mlp_width,
        "head": batch * (2 * heads * read * c.num_classes + pool),
    }
