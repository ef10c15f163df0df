"""One file for each layout of names in which weights are published.

A new layout is a new file here that defines `LAYOUT`; no other file lists it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from ..layout import Layout


@functools.cache
def every() -> tuple[Layout, ...]:
    """The layouts in the files beside this one, by their names."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"{__name__}.{name}").LAYOUT for name in modules)


def of_model_type(model_type: str) -> Layout | None:
    """The layout that reads transformers' config.json of this kind."""
    return next((layout for layout in every() if model_type in layout.model_types), None)


def model_types() -> list[str]:
    """All kinds of transformers' models that are read."""
    return sorted(kind for layout in every() for kind in layout.model_types)
