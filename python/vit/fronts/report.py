"""What vit.patch has swapped, and what not and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Swapped:
    """A module whose arithmetic is now vit's: its name, its class, the ops, where they run, and when not."""

    name: str
    kind: str
    ops: tuple[str, ...]
    backend: str
    note: str = ""


@dataclass(frozen=True)
class Left:
    """A module that is as it was, and why."""

    name: str
    kind: str
    reason: str


class PatchReport:
    """The report of vit.patch, which undoes it: `undo()`, or the end of a `with` block.

    str() of it is a table in which modules whose names differ in numbers alone stand in one line.
    """

    def __init__(self, model: str, backend: str, swapped: tuple[Swapped, ...], left: tuple[Left, ...]) -> None:
        self.model, self.backend, self.swapped, self.left = model, backend, swapped, left
        self._classes: list[tuple[str, nn.Module, type, type]] = []  # name, module, its class before and since

    def remember(self, name: str, module: nn.Module, before: type, since: type) -> None:
        """A module that undo() gives its class back."""
        self._classes.append((name, module, before, since))

    def undo(self) -> None:
        """Gives every module its own code back. A second call does nothing.

        Raises ValueError, and changes nothing, if something else has changed a module's class since.
        """
        changed = [name for name, module, _, since in self._classes if type(module) is not since]
        if changed:
            raise ValueError(
                f"vit: patch cannot be undone: {', '.join(changed[:8])} {_were(changed)} given another class since "
                "(parametrizations, sharding); take that off first"
            )
        for _, module, before, _ in self._classes:
            module.__class__ = before
        self._classes.clear()

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.undo()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and texts, for JSON."""
        return {
            "model": self.model,
            "backend": self.backend,
            "swapped": [
                {"name": s.name, "kind": s.kind, "ops": list(s.ops), "backend": s.backend, "note": s.note}
                for s in self.swapped
            ],
            "left": [{"name": one.name, "kind": one.kind, "reason": one.reason} for one in self.left],
        }

    def __str__(self) -> str:
        lines = [f"{self.model}, backend={self.backend!r}: {len(self.swapped)} swapped, {len(self.left)} left"]
        swapped = [(s.name, (s.kind, ", ".join(s.ops), s.backend, s.note)) for s in self.swapped]
        left = [(one.name, (one.kind, "left", "-", one.reason)) for one in self.left]
        rows = [("module", "class", "op", "backend", ""), *_grouped(swapped), *_grouped(left)]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        for row in rows:
            lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]))
        return "\n".join(line.rstrip() for line in lines)


def _were(names: list[str]) -> str:
    return "was" if len(names) == 1 else "were"


def _grouped(rows: Sequence[tuple[str, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Rows whose names differ in their numbers alone and whose other cells are equal, as one."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, cells in rows:
        groups.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), *cells), []).append(name)
    return [(names[0] if len(names) == 1 else key[0], *key[1:]) for key, names in groups.items()]
