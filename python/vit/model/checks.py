"""Checks of a model's arguments: ValueError with what was given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence


def choice(**arguments: tuple[str, Sequence[str]]) -> None:
    """Each argument is (value, allowed values)."""
    for name, (value, allowed) in arguments.items():
        if value not in allowed:
            raise ValueError(f"vit: {name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def positive(**sizes: int) -> None:
    """Whole numbers from 1."""
    for name, size in sizes.items():
        if not _whole(size) or size < 1:
            raise ValueError(f"vit: {name} must be a positive whole number, got {size!r}")


def sides(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    """One side or (height, width) as (height, width): whole numbers from 1."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(_whole(side) and side >= 1 for side in pair):
        raise ValueError(f"vit: {name} must be a positive whole number or (height, width), got {size!r}")
    return pair


def number(low: float, **values: float) -> None:
    """Finite numbers from `low`."""
    for name, value in values.items():
        if not _number(value) or not low <= value < math.inf:
            raise ValueError(f"vit: {name} must be a number from {low:g}, got {value!r}")


def finite(**values: float) -> None:
    """Finite numbers."""
    for name, value in values.items():
        if not _number(value) or not math.isfinite(value):
            raise ValueError(f"vit: {name} must be a finite number, got {value!r}")


def count(**sizes: int) -> None:
    """Whole numbers from 0."""
    for name, size in sizes.items():
        if not _whole(size) or size < 0:
            raise ValueError(f"vit: {name} must be a whole number from 0, got {size!r}")


def switches(**values: bool) -> None:
    """True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"vit: {name} must be True or False, got {value!r}")


def rate(**rates: float) -> None:
    """Probabilities of dropping something: 0 up to but not 1."""
    for name, value in rates.items():
        if not _number(value) or not 0.0 <= value < 1.0:
            raise ValueError(f"vit: {name} must be at least 0 and below 1, got {value!r}")


def classes(num_classes: int) -> None:
    """Whole numbers from 0, which stands for a model without a head."""
    if not _whole(num_classes) or num_classes < 0:
        raise ValueError(f"vit: num_classes must be 0 (features) or a whole number above, got {num_classes!r}")


def pooling(global_pool: str, class_token: bool, fc_norm: bool | None = None) -> None:
    """There is a class token to pool; fc_norm is a choice or None."""
    if global_pool == "token" and not class_token:
        raise ValueError('vit: global_pool="token" needs class_token=True; use global_pool="avg"')
    if fc_norm not in (None, False, True):
        raise ValueError(f"vit: fc_norm must be True, False or None, got {fc_norm!r}")


def absent(kind: str, **values: object) -> None:
    """Options that a kind of model does not have: each must be 0 or None."""
    for name, value in values.items():
        if value:
            raise ValueError(f"vit: {name}={value!r} is an option of VisionTransformer; {kind} does not have it")


def decoder(widths: Sequence[int], global_pool: str) -> tuple[int, ...]:
    """Channels of the stages of a decoder, which reads all tokens; none without one."""
    if not isinstance(widths, (tuple, list)) or not all(_whole(width) and 1 <= width <= 4096 for width in widths):
        raise ValueError(f"vit: decoder must be a list of numbers of channels from 1 to 4096, got {widths!r}")
    if len(widths) > 5:
        raise ValueError(f"vit: decoder has {len(widths)} stages, each of which doubles the sides; 5 are the most")
    if widths and global_pool:
        raise ValueError(f"vit: decoder reads all tokens: global_pool must be '', got {global_pool!r}")
    return tuple(widths)


def mlp_width(embed_dim: int, num_heads: int, mlp_ratio: float) -> int:
    """int(embed_dim * mlp_ratio), from 1; the heads divide embed_dim."""
    number(0.0, mlp_ratio=mlp_ratio)
    number(0.0, mlp_width=embed_dim * mlp_ratio)  # infinite for ratios that are finite, too
    width = int(embed_dim * mlp_ratio)
    positive(mlp_width=width)
    if embed_dim % num_heads:
        raise ValueError(f"vit: embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
    return width


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
