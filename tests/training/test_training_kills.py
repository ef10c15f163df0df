"""SIGKILL at moments that nobody chose, in each mode, with the same command each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_kills import MODES, kill_and_resume


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_is_resumed_to_the_bit(mode: str, tmp_path: Path) -> None:
    assert kill_and_resume(mode, kills=3, seed=1, folder=tmp_path).total() == 3
