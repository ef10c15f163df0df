"""A matplotlib figure that needs no display and touches no global state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..support.extras import require
from ..support.files import replacing


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that size in inches, drawn by the Agg renderer."""
    _headless()
    figure = require("matplotlib.figure", "train").Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg", "train").FigureCanvasAgg(figure)
    return figure


def _headless() -> None:
    """Imports matplotlib, which stops where MPLBACKEND names no backend of its own: nothing here asks for one."""
    named = os.environ.pop("MPLBACKEND", None)
    try:
        require("matplotlib", "train")
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named


def save(figure: Any, path: Path) -> None:
    """Replaces the picture at `path`; its suffix is the format: .png, .pdf or .svg."""
    kind = path.suffix.removeprefix(".").lower() or "png"
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}  # equal pictures are equal files
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, format=kind, metadata=undated.get(kind))
