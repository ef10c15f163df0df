"""The kinds of data sets. Each is one module here with FORMAT; a new file is a new kind."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ..format import Format


@cache
def formats() -> dict[str, Format]:
    """Name -> kind of data set, in the order in which they are asked whether they know a data set."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    found = {name: importlib.import_module(f"{__name__}.{name}").FORMAT for name in names}
    return dict(sorted(found.items(), key=lambda item: (item[1].rank, item[0])))
