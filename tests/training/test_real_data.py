"""Trainings on real data that comes in packages (scripts/real_data.py), in small form; benchmarks/real_data.py has the
figures of docs/training.md."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from vit.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.real]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a data set, by name; a test whose package cannot be had here is skipped, with the reason."""
    spec = importlib.util.spec_from_file_location("real_data", ROOT / "scripts" / "real_data.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    root = tmp_path_factory.mktemp("real")

    def prepare(name: str) -> Path:
        try:
            return script.prepare(root, name)
        except script.Unavailable as error:
            pytest.skip(str(error))

    return prepare


def accuracy(capsys: pytest.CaptureFixture[str], *words: str) -> float:
    """The test accuracy of `vit train`."""
    assert main(["train", *words, "--threads", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["test_accuracy"]


def test_the_digits_of_mnist(prepared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tenth of the recipe's epochs on a smaller model, then a submission: 79 % on a Zen 3, a guess has 10."""
    data = prepared("mnist5k")
    words = ["--epochs", "8", "--ema", "0.9", "--warmup-epochs", "1", "--batch-size", "32", "--augment", "affine"]
    words += ["--arch", "patch_size=7", "depth=2"]
    out = tmp_path / "run"
    assert accuracy(capsys, "--recipe", "kaggle_digits", "--data", str(data), *words, "--out", str(out)) >= 0.7
    answers = tmp_path / "submission.csv"
    assert main(["predict", str(out), "--data", str(data / "test.csv"), "--submission", str(answers)]) == 0
    assert len(answers.read_text().splitlines()) == 1001


def test_fashion_mnist(prepared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One epoch of a smaller model, which looks at patches of 7 x 7; a guess has a tenth."""
    words = ["--epochs", "1", "--warmup-epochs", "0.1", "--ema", "0.99", "--arch", "patch_size=7", "depth=2"]
    data = str(prepared("fashion_mnist"))
    found = accuracy(capsys, "--recipe", "fashion_mnist", "--data", data, *words, "--out", str(tmp_path / "run"))
    assert found >= 0.7


def test_dinov2_on_faces(prepared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its features without a training, and two epochs of fine-tuning, at 56 pixels."""
    pytest.importorskip("onnx")
    data, weights = str(prepared("faces")), str(prepared("dinov2") / "dinov2_small.safetensors")
    model = ["--model", "vit_small_patch14_dinov2", "--arch", "img_size=56"]
    assert main(["eval", weights, *model, "--data", data, "--knn", "5", "--probe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 74
    assert min(found["knn_accuracy"], found["probe_accuracy"]) >= 0.85
    words = ["--recipe", "finetune", *model, "--weights", weights, "--data", data, "--val-fraction", "0"]
    words += ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "16", "--crop-area", "0.8", "--ema", "0"]
    assert accuracy(capsys, *words, "--out", str(tmp_path / "run")) >= 0.85
