"""`pytest benchmarks/` runs the benchmark list and prints its tables; it fails when a candidate fails, never by speed.

How fast is fast enough is decided by people who read the figures: on a busy machine a threshold would only teach
everybody to ignore it. `vit bench --help` shows how to run one part of the list, and how to keep its records.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vit.backends import NativeBackend, records
from vit.cli import main
from vit.ops import OPS

NATIVE = [name for name, b in records().items() if isinstance(b, NativeBackend) and b.unavailable() is None]


def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, *options: str) -> list[dict]:
    """The records of one `vit bench`, whose table goes to the terminal."""
    report = tmp_path / "bench.json"
    with capsys.disabled():
        print()
        assert main(["bench", "--json", str(report), *options]) == 0
    found = json.loads(report.read_text())
    assert found["environment"]["cpu"]
    assert all(record["ms_min"] > 0 for record in found["records"])
    return found["records"]


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("op", OPS)
def test_ops(op: str, backend: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--backends", backend, "--dtype", "float32,bfloat16", "--rounds", "5")
    measured = bench(capsys, tmp_path, "--ops", "--op", op, *options)
    assert {record["backend"] for record in measured} == {"torch", backend}


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize(
    ("model", "mode", "batch"),
    [
        ("vit_tiny_patch16_224", "inference", "1,8"),
        ("vit_small_patch16_224", "inference", "1,8"),
        ("vit_base_patch16_224", "inference", "1,8"),
        ("vit_small_patch16_224", "train", "16"),
    ],
)
def test_models(
    model: str, mode: str, batch: str, backend: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--backends", f"reference,timm,{backend}", "--dtype", "float32,bfloat16", "--rounds", "3")
    measured = bench(capsys, tmp_path, "--models", model, "--mode", mode, "--batch", batch, *options)
    assert {record["backend"] for record in measured} == {"reference", "timm", backend}
