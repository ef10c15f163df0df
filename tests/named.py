"""Choices of named models for tests that cannot run over all of them."""

from __future__ import annotations

from vit.model import zoo

#: The names without options, whose models differ in size only, up to the width of a "giant".
PLAIN = sorted(
    name
    for name, entry in zoo.names().items()
    if (entry.kind, entry.resize) == ("vit", None) and len(entry.arch) == 5 and entry.arch["embed_dim"] <= 1408
)


def one_of_each_kind() -> list[str]:
    """The narrowest name of each set of a VisionTransformer's options."""
    found: dict[tuple[object, ...], str] = {}
    for name, entry in sorted(zoo.names().items(), key=lambda item: item[1].arch["embed_dim"]):
        if entry.kind in ("vit", "deit"):
            found.setdefault((entry.kind, *sorted(map(str, list(entry.arch.items())[5:]))), name)
    return sorted(found.values())
