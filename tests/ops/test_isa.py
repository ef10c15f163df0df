"""The CPU kernels at every instruction-set level this machine has, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import NATIVE, USABLE
from vit.parity import cases

GROUPS = ("odd", "corner")
INFO = NATIVE["cpu"].info() if "cpu" in USABLE else {}
LEVELS = INFO.get("isa available", "").split(", ")


def parity(tmp_path, level: str, *options: str) -> tuple[int, dict, str]:
    """`vit parity` with VIT_CPU_ISA set: exit code, report, output."""
    report = tmp_path / "parity.json"
    done = subprocess.run(
        [sys.executable, "-m", "vit", "parity", "--backend", "cpu", "--json", str(report), *options],
        env=os.environ | {"VIT_CPU_ISA": level}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done.returncode, json.loads(report.read_text()) if report.exists() else {}, done.stdout + done.stderr


@pytest.mark.skipif(not INFO, reason="the cpu backend is not built")
@pytest.mark.parametrize("level", [level for level in LEVELS if level and level != INFO.get("isa")])
def test_every_level_passes_parity(tmp_path, level):
    """The level in use without VIT_CPU_ISA is the one of test_ops.py."""
    code, report, output = parity(tmp_path, level, *(word for group in GROUPS for word in ("--group", group)))
    assert code == 0, output
    assert report["info"]["isa"] == level
    assert (report["failed"], report["skipped"]) == (0, 0)
    assert report["passed"] == len(cases("cpu", groups=GROUPS))


@pytest.mark.skipif(not INFO, reason="the cpu backend is not built")
def test_an_unknown_level_is_refused_with_the_known_ones(tmp_path):
    code, _, output = parity(tmp_path, "avx1024", "--pattern", "gelu-fwd-float32-c7$")
    assert code == 1
    assert 'VIT_CPU_ISA is "avx1024"' in output
    assert all(level in output for level in LEVELS)
    assert "Traceback" not in output
