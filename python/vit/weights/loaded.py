"""The report of a load: what became of every tensor of the file and where every parameter of the model comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..support.text import printable
from .layout import Mapped


@dataclass(frozen=True)
class Resampled:
    """A tensor that was brought to another size: from and to are grids, channels or patch sizes."""

    name: str
    old: tuple[int, ...]
    new: tuple[int, ...]
    rule: str


@dataclass(frozen=True)
class Report:
    """mapped: names of the file -> parameters of the model, and how. dropped: names of the file -> why. resampled: what
    was brought to another size. missing: parameters of the model that the file does not have -> what they are instead.
    """

    source: str
    layout: str
    model: str | None
    mapped: tuple[Mapped, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    resampled: tuple[Resampled, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and texts, for JSON."""
        return {
            "source": self.source,
            "layout": self.layout,
            "model": self.model,
            "mapped": [{"from": list(m.sources), "to": list(m.targets), "how": m.how} for m in self.mapped],
            "dropped": [{"name": name, "reason": why} for name, why in self.dropped.items()],
            "resampled": [
                {"name": r.name, "from": list(r.old), "to": list(r.new), "rule": r.rule} for r in self.resampled
            ],
            "missing": [{"name": name, "instead": what} for name, what in self.missing.items()],
        }

    def __str__(self) -> str:
        """Counts, and every name whose tensor did not go over as it is."""
        lines = [f"{self.source}: {self.layout}'s names" + (f" -> {self.model}" if self.model else "")]
        ways: dict[str, int] = {}
        for one in self.mapped:
            ways[one.how] = ways.get(one.how, 0) + len(one.sources)
        lines += [f"  mapped     {count:5} tensors {how}" for how, count in ways.items()]
        lines += [
            f"  resampled  {one.name} from {_size(one.old)} to {_size(one.new)}: {one.rule}" for one in self.resampled
        ]
        lines += [f"  dropped    {name}: {why}" for name, why in self.dropped.items()]
        lines += [f"  missing    {name}: {what}" for name, what in self.missing.items()]
        return "\n".join(map(printable, lines))


def _size(sides: tuple[int, ...]) -> str:
    return " x ".join(map(str, sides))


def report(loaded: Any) -> Report:
    """The report of the load that gave a model its weights; of a Checkpoint, the part of it that reading tells.

    Raises ValueError for a model that was not given weights by vit.create.
    """
    found = loaded.report() if hasattr(loaded, "mapped") else getattr(loaded, "load_report", None)
    if not isinstance(found, Report):
        raise ValueError(
            f"vit: weights.report: this {type(loaded).__name__} was not given weights by vit.create(weights=...); "
            "it takes such a model, or what vit.weights.read returns"
        )
    return found
