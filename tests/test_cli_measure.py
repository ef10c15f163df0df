"""`vit parity` and `vit bench`: their JSON, their exit codes, what they print."""

from __future__ import annotations

import json
import re

import pytest
from conftest import USABLE
from vit.cli import main

pytestmark = pytest.mark.skipif("cpu" not in USABLE, reason="the cpu backend is not built")


def test_parity_json_on_standard_output(capsys):
    assert main(["parity", "--backend", "cpu", "--pattern", "linear-.*m7n13k11", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["failed"], report["skipped"]) == (0, 0)
    assert report["passed"] == len(report["cases"]) > 10
    for case in report["cases"]:
        assert case["ok"] is True
        assert case["op"] == "linear"
        assert 0 <= case["error"] <= case["bound"]
    assert {case["direction"] for case in report["cases"]} == {"fwd", "bwd"}
    assert f"{report['passed']} passed, 0 failed, 0 skipped" in err


def test_parity_json_in_a_file_and_a_table_on_standard_output(capsys, tmp_path):
    target = tmp_path / "parity.json"
    assert main(["parity", "--op", "gelu", "--dtype", "float64", "--group", "odd", "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    assert {(c["op"], c["dtype"], c["group"]) for c in report["cases"]} == {("gelu", "float64", "odd")}
    out = capsys.readouterr().out
    assert "case closest to its bound" in out
    assert re.search(r"^gelu +float64 +gelu-\S+ +(\d+)/\1 +0\.\d\d$", out, re.MULTILINE)
    assert "\x1b" not in out  # plain lines in a pipe


def test_parity_fails_with_exit_code_1_and_says_where(capsys, monkeypatch):
    import vit.ops

    right = vit.ops.gelu
    monkeypatch.setattr(
        vit.ops, "gelu", lambda x, *a, backend: right(x, *a, backend=backend) * (1.1 if backend == "cpu" else 1)
    )
    assert main(["parity", "--pattern", "gelu-fwd-float32-m17c256$", "--json"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["failed"] == 1
    assert report["cases"][0]["ok"] is False
    assert "FAILED gelu-fwd-float32-m17c256" in err
    assert "torch's own error" in err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--backend", "cpuu"], "cpuu"),
        (["--pattern", "("], "unterminated"),
        (["--pattern", "no such case"], "no case matches"),
    ],
)
def test_parity_bad_usage(capsys, options, text):
    assert main(["parity", *options]) == 2
    assert text in capsys.readouterr().err


def test_parity_lists_ids(capsys):
    assert main(["parity", "--list", "--op", "attention", "--group", "regular"]) == 0
    ids = capsys.readouterr().out.split()
    assert "attention-bwd-bfloat16-b2n197h6d64-packed" in ids


@pytest.mark.slow
def test_bench_of_a_model(capsys, tmp_path):
    target, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = [
        "--models",
        "vit_mnist_demo",
        "--batch",
        "2",
        "--mode",
        "inference,train",
        "--rounds",
        "2",
        "--threads",
        "1",
    ]
    options += ["--backends", "reference,cpu", "--dtype", "bfloat16"]
    assert main(["bench", *options, "--json", str(target), "--plot", str(picture)]) == 0
    report = json.loads(target.read_text())
    assert len(report["records"]) == 4
    keys = {"model", "backend", "dtype", "batch", "mode", "threads", "ms_median", "ms_min", "images_per_second"}
    for record in report["records"]:
        assert keys <= record.keys()
        assert record["threads"] == 1
        assert record["images_per_second"] == pytest.approx(2000 / record["ms_median"])
        assert 0 < record["ms_min"] <= record["ms_median"]
        assert record["peak_memory_mb"] > 0
    assert {"cpu", "cpus", "torch", "threads", "peak_gflops", "backends"} <= report["environment"].keys()
    assert picture.stat().st_size > 1000
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.slow
def test_bench_of_ops(capsys, tmp_path):
    options = ["--ops", "--pattern", "linear-fwd-float32-b4m17n192k64", "--rounds", "2", "--threads", "1", "--json"]
    assert main(["bench", *options]) == 0
    records = json.loads(capsys.readouterr().out)["records"]
    assert [r["backend"] for r in records[:2]] == ["torch", USABLE[0]]
    assert records[0]["ratio_to_torch"] == 1
    assert records[1]["unit"] == "GFLOP/s"
    assert records[1]["rate"] == pytest.approx(2e-6 * 4 * 17 * 192 * 64 / records[1]["ms_median"])


@pytest.mark.parametrize(
    "options",
    [
        ["--models", "vit_nano"], ["--batch", "0"], ["--batch", "x"], ["--dtype", "int8"], ["--mode", "fast"],
        ["--rounds", "0"], ["--threads", "0"], ["--backends", "cpuu"],
        ["--backends", "timm,cpu", "--models", "vit_digits"],
        ["--ops", "--pattern", "no such case"], ["--ops", "--pattern", "("],
    ],
    ids=" ".join,
)  # fmt: skip
def test_bench_bad_usage(capsys, options):
    assert main(["bench", *options]) == 2
    assert capsys.readouterr().err
