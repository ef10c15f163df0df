"""Options that are known to work, as YAML files of this folder: `about`, the kind of data they are the default of
(`kind`, may be absent) and `options` of `vit train`. A new file is a new recipe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...support.records import Record

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """`options`: values of TrainConfig; `kind`: the kind of data whose open options they fill, or None."""

    name: str
    about: str
    kind: str | None
    options: dict[str, Any]


@cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name. MissingExtra without PyYAML."""
    return {path.stem: _read(path) for path in sorted(FOLDER.glob("*.yaml"))}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError names those there are."""
    if name not in recipes():
        raise ValueError(
            f"vit: there is no recipe {name!r}; known are {', '.join(recipes())} (a file of your own: --config FILE)"
        )
    return recipes()[name]


def of_kind(kind: str) -> Recipe:
    """The recipe that fills the open options for a kind of data."""
    return next(recipe for recipe in recipes().values() if recipe.kind == kind)


def _read(path: Path) -> Recipe:
    record = Record.read(path)
    recipe = Recipe(path.stem, record.text("about"), record.text("kind", None), dict(record.record("options").values))
    record.finish()
    return recipe
