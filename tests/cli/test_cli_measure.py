"""`vit parity` and `vit bench`: their JSON, their exit codes, what they print."""

from __future__ import annotations

import json
import re

import pytest
from conftest import USABLE
from rounding import MODEL
from vit.cli import main
from vit.cli.bench import _merged

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
        (["--device", "gpu"], "must be like cpu, cuda:0 or xpu, got 'gpu'"),
        (["--json", "no/such/folder/report.json"], "there is no folder"),
        (["--json", "."], "cannot be written"),
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
        if record["mode"] == "inference":  # the same weights and images for all
            assert record["logits_cosine"] > 0.999
            assert record["logits_max_error"] < 6 * 2**-7  # of the largest logit: 6 roundings of bfloat16
    environment = {"cpu", "cpu_flags", "cpu_isa", "cpus", "governor", "load_before", "torch", "threads", "peak_gflops"}
    assert environment <= report["environment"].keys()
    assert not report["refused"]
    assert picture.stat().st_size > 1000
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.slow
def test_bench_against_a_peer_and_who_cannot_run(capsys, tmp_path):
    target = tmp_path / "bench.json"
    options = ("--models", "vit_tiny_patch16_224:img_size=64:depth=2", "--batch", "1", "--dtype", "float32,int8")
    race = ("--backends", "cpu", "--against", "timm", "--rounds", "1", "--threads", "1")
    assert main(["bench", *options, *race, "--json", str(target)]) == 0  # nothing failed that should have worked
    report = json.loads(target.read_text())
    assert [(r["backend"], r["dtype"]) for r in report["records"]] == [("cpu", "float32"), ("timm", "float32")]
    assert all(record["logits_max_error"] < MODEL * 2**-23 for record in report["records"])
    (started,) = report["start_up"]
    assert (started["backend"], started["dtype"]) == ("timm", "float32")
    assert min(started[key] for key in ("import_seconds", "construct_seconds", "first_batch_seconds")) > 0
    assert started["process_memory_mb"] > 100
    refused = {entry["backend"]: entry["reason"] for entry in report["refused"]}
    assert {entry["dtype"] for entry in report["refused"]} == {"int8"}
    assert "engine's" in refused["cpu"]
    assert "torchao" in refused["timm"]
    out = capsys.readouterr().out
    assert "timm: not timed: PyTorch's own int8" in out
    assert "first batch of a fresh process" in out


def test_races_that_were_run_again_replace_the_old_ones():
    """All candidates of a race go together: they were timed side by side."""

    def entry(batch: int, backend: str, ms: float) -> dict:
        return {"model": "m", "dtype": "float32", "batch": batch, "backend": backend, "ms_median": ms}

    old = {
        "environment": "old",
        "records": [entry(1, "cpu", 1), entry(1, "timm", 1), entry(2, "cpu", 1)],
        "refused": [entry(1, "onnxruntime", 0), entry(2, "onnxruntime", 0)],
        "start_up": [entry(1, "timm", 1)],
    }
    new = {"environment": "new", "records": [entry(1, "cpu", 2)], "refused": []}
    merged = _merged(old, new)
    assert merged["environment"] == "new"
    assert merged["records"] == [entry(2, "cpu", 1), entry(1, "cpu", 2)]
    assert merged["refused"] == [entry(2, "onnxruntime", 0)]
    assert merged["start_up"] == old["start_up"], "fresh processes are no race"
    assert _merged(None, new) == new


def test_bench_of_a_model_with_fixed_positions(tmp_path):
    target = tmp_path / "bench.json"
    options = ["--models", "vit_digits", "--backends", "reference", "--batch", "1", "--rounds", "1"]
    assert main(["bench", *options, "--json", str(target)]) == 0
    assert json.loads(target.read_text())["records"][0]["logits_cosine"] > 0.999


@pytest.mark.slow
def test_bench_of_ops_merged_with_an_earlier_run(tmp_path):
    target, other = tmp_path / "bench.json", {"id": "another case", "backend": "cpu", "ms_median": 1.0}
    target.write_text(json.dumps({"environment": {}, "records": [other], "refused": []}))
    options = ["--ops", "--pattern", "linear-fwd-float32-b4m17n192k64", "--rounds", "2", "--threads", "1"]
    assert main(["bench", *options, "--json", str(target), "--merge"]) == 0
    first, *records = json.loads(target.read_text())["records"]
    assert first == other
    assert [r["backend"] for r in records[:2]] == ["torch", USABLE[0]]
    assert records[0]["ratio_to_torch"] == 1
    assert records[1]["unit"] == "GFLOP/s"
    assert records[1]["rate"] == pytest.approx(2e-6 * 4 * 17 * 192 * 64 / records[1]["ms_median"])


@pytest.mark.parametrize(
    "options",
    [
        ["--models", "vit_nano"], ["--batch", "0"], ["--batch", "x"], ["--dtype", "int3"], ["--mode", "fast"],
        ["--rounds", "0"], ["--threads", "0"], ["--backends", "cpuu"], ["--backends", ""], ["--models", ","],
        ["--backends", "timm,cpu", "--models", "vit_digits"],
        ["--ops", "--pattern", "no such case"], ["--ops", "--pattern", "("],
        ["--against", "tensorflow"], ["--against", "timm", "--ops"], ["--against", "timm", "--models", "vit_digits"],
        ["--models", "vit_digits:img_size"], ["--models", "vit_digits:img_size=big"], ["--merge"],
        ["--json", "no/such/folder/bench.json"], ["--plot", "no/such/folder/bench.png"], ["--device", "gpu"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_bench_bad_usage(capsys, options):
    assert main(["bench", *options]) == 2
    text = capsys.readouterr().err
    assert "vit bench: " in text
    assert "_numbers" not in text
    assert "vit: " not in text.replace("vit bench: ", "")
