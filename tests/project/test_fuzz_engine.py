"""The C API of the engine under sanitizers: its build and its cases take one core beside the two of test_fuzz.py."""

from __future__ import annotations

import pytest
from fuzz import native

pytestmark = pytest.mark.fuzz


def test_the_c_api_with_damaged_files_and_calls(tmp_path):
    """Random networks, calls and engine files, on the lowest instruction-set level: what is tried lies above it."""
    good, text = native.fuzz(tmp_path, tmp_path / "kept", seed=0)
    assert good, text
