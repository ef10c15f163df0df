"""The scripts of benchmarks/ race: their own harness with two small candidates, and two commits with one op."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import vit

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_candidates_of_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import seeds
    from script import raced

    (times, equal), (_, also) = raced(seeds.cut, [("a loop over patches",), ("patchify",)], 1)
    assert 0 < times["ms_min"] <= times["ms_median"]
    assert equal
    assert also
    with pytest.raises(RuntimeError, match="KeyError: 'scissors'"):
        raced(seeds.cut, [("scissors",)], 1)


def test_two_commits(tmp_path: Path) -> None:
    package = str(Path(vit.__file__).parents[1])  # the same one twice
    command = [sys.executable, str(BENCHMARKS / "commits.py"), package, package, "--backend", "reference"]
    command += [
        "--cases",
        "^(gelu of 64|layer_norm backward)$",
        "--dtype",
        "bfloat16",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    subprocess.run([*command, "--json", str(tmp_path / "f.json")], check=True, capture_output=True, text=True)
    records = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert [record["case"] for record in records] == ["gelu of 64", "layer_norm backward"]
    assert all(0 < record["old_ms_min"] <= record["old_ms"] and record["dtype"] == "bfloat16" for record in records)
