"""The page of models says what the tables say."""

from __future__ import annotations

import runpy
from pathlib import Path

import vit
from vit.model import zoo

ASSETS = Path(__file__).resolve().parents[2] / "docs" / "assets"


def test_the_committed_page_is_what_the_script_writes():
    written = runpy.run_path(str(ASSETS / "models.py"))["page"]()
    assert (ASSETS.parent / "models.md").read_text(encoding="utf-8") == written, "run: python docs/assets/models.py"
    for name in (*zoo.names(), *vit.list_models(tags=True)):
        assert f"| `{name}` |" in written
