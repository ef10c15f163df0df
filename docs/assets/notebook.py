"""Writes examples/from_scratch.ipynb from examples/from_scratch.py: `python docs/assets/notebook.py`.

`# %%` begins a cell of code, `# %% [markdown]` one of text in comments; the module's docstring is the first cell.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPT, NOTEBOOK = EXAMPLES / "from_scratch.py", EXAMPLES / "from_scratch.ipynb"


def cells(script: str) -> list[tuple[str, str]]:
    """(kind, source) of each cell of a script."""
    title, *parts = script.split("\n# %%")
    found = [("markdown", ast.get_docstring(ast.parse(title)) or "")]
    for part in parts:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            found.append(
                ("markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines()))
            )
        else:
            found.append(("code", body))
    return [(kind, source.strip("\n")) for kind, source in found]


def notebook(script: str) -> dict[str, Any]:
    """The notebook of a script, in format 4.5, without outputs."""
    found = []
    for number, (kind, source) in enumerate(cells(script)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        found.append(cell | {"source": source.splitlines(keepends=True)})
    about = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": found, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def text() -> str:
    """The file of the notebook."""
    made = notebook(SCRIPT.read_text(encoding="utf-8"))
    return json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(text(), encoding="utf-8")
