"""Optional dependencies: imported where they are used, with an error that names the extra which installs
them."""

from __future__ import annotations

import importlib
from typing import Any, TextIO


class MissingExtra(ImportError):
    """A package that only some commands need is not installed; the text says how to install it."""


def interactive(stream: TextIO) -> bool:
    """Whether rich may draw on the stream: it is a terminal, and rich is installed."""
    if not stream.isatty():
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def require(module: str, extra: str) -> Any:
    """The imported module; MissingExtra names the extra of this distribution that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:  # the package is there, one of its own imports is not
            raise
        raise MissingExtra(
            f"vit: this needs {error.name}, which is not installed; run: pip install 'vit-kernels[{extra}]'"
        ) from error
