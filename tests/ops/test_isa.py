"""Kernels compiled once per instruction-set level, at every level this machine has, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NATIVE, USABLE
from vit.parity import cases

GROUPS = ("odd", "corner")
INFO = {name: info for name in USABLE if "isa" in (info := NATIVE[name].info())}
LEVELS = {name: info["isa available"].split(", ") for name, info in INFO.items()}
LOWER = [(name, level) for name, levels in LEVELS.items() for level in levels if level != INFO[name]["isa"]]


def parity(tmp_path, backend: str, level: str, *options: str) -> tuple[int, dict, str]:
    """`vit parity` with VIT_CPU_ISA set: exit code, report, output."""
    report = tmp_path / "parity.json"
    done = subprocess.run(
        [sys.executable, "-m", "vit", "parity", "--backend", backend, "--json", str(report), *options],
        env=os.environ | {"VIT_CPU_ISA": level}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done.returncode, json.loads(report.read_text()) if report.exists() else {}, done.stdout + done.stderr


@pytest.mark.parametrize(("backend_name", "level"), LOWER)
def test_every_level_passes_parity(tmp_path, backend_name, level):
    """The level in use without VIT_CPU_ISA is the one of test_ops.py."""
    groups = [word for group in GROUPS for word in ("--group", group)]
    code, report, output = parity(tmp_path, backend_name, level, *groups)
    assert code == 0, output
    assert report["info"]["isa"] == level
    assert (report["failed"], report["skipped"]) == (0, 0)
    assert report["passed"] == len(cases("cpu", groups=GROUPS))


@pytest.mark.skipif("VIT_CPU_ISA" in os.environ, reason="VIT_CPU_ISA names a level")
@pytest.mark.parametrize("backend_name", INFO)
def test_the_last_level_is_chosen_but_for_a_slow_dot_product(backend_name):
    """Intel's avx512bf16 multiplies bfloat16 at half the speed of float32."""
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    levels = [level for level in LEVELS[backend_name] if not (intel and level == "avx512bf16")]
    assert INFO[backend_name]["isa"] == levels[-1]


@pytest.mark.parametrize("backend_name", INFO)
def test_an_unknown_level_is_refused_with_the_known_ones(tmp_path, backend_name):
    code, _, output = parity(tmp_path, backend_name, "avx1024", "--pattern", "gelu-fwd-float32-c7$")
    assert code == 1
    assert 'VIT_CPU_ISA is "avx1024"' in output
    assert all(level in output for level in LEVELS[backend_name])
    assert "Traceback" not in output
