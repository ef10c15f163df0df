"""The picture of the README shows the backends, ops and rooms there are."""

from __future__ import annotations

import runpy
from pathlib import Path

from vit.backends import records

ASSETS = Path(__file__).resolve().parents[2] / "docs" / "assets"


def test_the_committed_picture_is_what_the_script_draws():
    drawn = runpy.run_path(str(ASSETS / "architecture.py"))["draw"]()
    assert (ASSETS / "architecture.svg").read_text(encoding="utf-8") == drawn, "run: python docs/assets/architecture.py"
    for name in records():
        assert f">{name}</text>" in drawn
