"""What an engine gives: names of outputs, and the tensors that they are written to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import native
from .images import check_out, room


def kind_of(output: str, depth: int) -> tuple[str, int]:
    """What an output is and of which block, 0 where it is of none; ValueError for an unknown name."""
    kind, _, block = output.partition(".")
    if output in ("logits", "features"):
        return kind, 0
    if kind in ("tokens", "attention") and block.isdigit() and int(block) < depth:
        return kind, int(block)
    raise ValueError(
        f"vit.Engine: unknown output {output!r}; there are logits, features, and tokens.I and attention.I for I from "
        f"0 to {depth - 1}"
    )


def places(
    names: tuple[str, ...],
    out: Tensor | Mapping[str, Tensor] | None,
    single: bool,
    shape: Callable[[str], tuple[int, ...]],
    device: torch.device,
) -> dict[str, Tensor]:
    """Where each output of that shape goes: the caller's tensors, checked, or new ones."""
    if not names or len(set(names)) != len(names):
        raise ValueError(f"vit.Engine: outputs must be different names, at least one; got {names}")
    if out is None:
        return {name: room(shape(name), device) for name in names}
    if isinstance(out, Tensor) and not single:
        raise ValueError("vit.Engine: with several outputs `out` must be a dict of a tensor for each name")
    given = {names[0]: out} if isinstance(out, Tensor) else dict(out)
    if set(given) != set(names):
        raise ValueError(f"vit.Engine: out has {', '.join(given)}; wanted are {', '.join(names)}")
    for name, tensor in given.items():
        check_out(name, tensor, shape(name), device)
    return {name: given[name] for name in names}


def shape_of(c: native.Config, output: str, batch: int, tokens: int) -> tuple[int, ...]:
    """The shape of an output for a batch of images that have so many tokens each; ValueError for an unknown name."""
    kind, _ = kind_of(output, c.depth)
    if kind == "tokens":
        return batch, tokens, c.embed_dim
    if kind == "attention":
        return batch, c.num_heads, tokens
    of_each = (tokens,) if c.pool == native.POOLS[""] else ()
    return batch, *of_each, c.num_classes if output == "logits" and c.num_classes else c.embed_dim
