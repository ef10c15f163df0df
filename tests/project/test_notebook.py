"""examples/from_scratch.ipynb: the script's cells, without outputs, and running."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASSETS, NOTEBOOK = ROOT / "docs" / "assets" / "notebook.py", ROOT / "examples" / "from_scratch.ipynb"

#: In a process of its own: the kernel's client brings an event loop, and warnings of its packages.
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(notebook)
NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
for cell in notebook.cells:
    for output in cell.get("outputs", []):
        print(output.get("text", " ".join(output.get("data", {}))), end="")
"""


def test_the_committed_notebook_is_what_the_script_makes() -> None:
    made = runpy.run_path(str(ASSETS))["text"]()
    assert NOTEBOOK.read_text(encoding="utf-8") == made, "run: python docs/assets/notebook.py"


def test_text_and_code_are_told_apart() -> None:
    script = '"""Title.\n\nMore.\n"""\n\n# %%\nimport os\n\n\n# %% [markdown]\n# ## Part\n#\n# Text.\n\n'
    script += "# %%\nx = 1  # %% no cell\n"
    cells = runpy.run_path(str(ASSETS))["cells"](script)
    code = [("code", "import os"), ("markdown", "## Part\n\nText."), ("code", "x = 1  # %% no cell")]
    assert cells == [("markdown", "Title.\n\nMore."), *code]


def test_nobody_runs_it_with_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    assert {cell["cell_type"] for cell in cells} == {"code", "markdown"}


def test_it_runs(tmp_path: Path) -> None:
    """Its own assertions hold: gradients to 1e-12 in float64, nine of ten digits right."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    command = [sys.executable, "-c", RUN, str(NOTEBOOK)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gradients checked" in done.stdout
    assert "epoch 7: loss" in done.stdout
    assert "image/png" in done.stdout
