"""Options that are known to work, as YAML files of this folder. A new file is a new recipe.

about      one line
kind       the kind of data whose open options it fills; without it the recipe is only used by its name
task, data, metric     what is learned, from what (--data), and by which figure it is judged
expected   the figure it reaches (null: nobody has run it here), minutes how long that takes on two cores
expected_on     of which images that is the figure
options    values of TrainConfig
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...support.records import Record

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """A recipe; see the module's text for what its fields say."""

    name: str
    about: str
    kind: str | None
    task: str
    data: str
    metric: str
    expected: float | None
    minutes: float | None
    expected_on: str | None
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


def defaults() -> list[Recipe]:
    """The recipes that fill the open options for a kind of data."""
    return [recipe for recipe in recipes().values() if recipe.kind]


def of_kind(kind: str) -> Recipe:
    """The recipe that fills the open options for a kind of data."""
    return next(recipe for recipe in defaults() if recipe.kind == kind)


def _read(path: Path) -> Recipe:
    record = Record.read(path)
    recipe = Recipe(
        name=path.stem,
        about=record.text("about"),
        kind=record.text("kind", None),
        task=record.text("task", "classification"),
        data=record.text("data"),
        metric=record.text("metric", "test_accuracy"),
        expected=record.number("expected") if record.raw("expected") is not None else None,
        minutes=record.number("minutes") if record.raw("minutes") is not None else None,
        expected_on=record.text("expected_on", None),
        options=dict(record.record("options").values),
    )
    record.finish()
    return recipe
