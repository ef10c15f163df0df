"""A matplotlib figure that needs no display and touches no global state."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from ..support.extras import require
from ..support.files import write_bytes

#: Formats of pictures, by suffix.
SUFFIXES = (".png", ".svg", ".pdf")
#: Text that can be searched and edited, names inside an SVG that depend on the picture alone.
WRITTEN = {"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "vit"}


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    """An empty figure of that size in inches, drawn by the Agg renderer. layout: matplotlib's, None for one by hand."""
    _headless()
    figure = require("matplotlib.figure", "train").Figure(figsize=(width, height), layout=layout)
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


def save(figure: Any, path: str | Path) -> None:
    """Replaces the picture at `path`; its suffix is the format: .png, .pdf or .svg."""
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower() or "png"
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}  # equal pictures are equal files
    content = io.BytesIO()  # matplotlib leaves a PDF open that the disk does not take
    with require("matplotlib", "train").rc_context(WRITTEN):
        figure.savefig(content, dpi=160, format=kind, metadata=undated.get(kind))
    write_bytes(path, content.getvalue())
