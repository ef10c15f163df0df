"""Searches over options: what may vary, that a sweep goes on where it was killed, and its table."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from training_helpers import TINY, same_bits
from vit.cli import main
from vit.training import TrainConfig
from vit.training.vary import Vary, applied, parse

FAST = [*TINY, "--epochs", "1", "--warmup-epochs", "0", "--threads", "1"]


def test_ranges_and_values() -> None:
    found = parse(["lr=1e-4..1e-2", "depth=1,2,4", "--batch-size=32..64", "loss=ce,bce", "arch.patch_size=2,4"])
    assert found == [
        Vary("lr", False, low=1e-4, high=1e-2),
        Vary("depth", True, choices=(1, 2, 4)),
        Vary("batch_size", False, low=32, high=64),
        Vary("loss", False, choices=("ce", "bce")),
        Vary("patch_size", True, choices=(2, 4)),
    ]
    assert [one.log for one in found] == [True, False, False, False, False]
    config = applied(TrainConfig(arch={"depth": 9}), found[:2], {"lr": 3e-3, "depth": 2})
    assert (config.lr, config.arch) == (3e-3, {"depth": 2})


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("lr", "takes NAME=LOW..HIGH or NAME=A,B,C"),
        ("lr=", "takes NAME="),
        ("leaning=1..2", "has no 'leaning'"),
        ("dept=1,2", "did you mean depth"),
        ("lr=1..0.1", "1 is not below 0.1"),
        ("lr=0.1..many", "'many' is no number"),
        ("lr=nan..1", "'nan' is no number"),
        ("lr=-1,1", "--lr is -1.0; allowed"),
        ("mixup=0..9", "--mixup is 9.0; allowed"),
        ("epochs=1.5,2", "it must be a int"),
        ("loss=ce,ca", "--loss is 'ca'; allowed"),
        ("loss=ce..bce", "loss is one of ce, bce"),
        ("depth=1,,2", "has an empty value"),
        ("depth=2,2", "has a value twice"),
        ("workers=1,2", "it makes no other training"),
        ("data=a,b", "it makes no other training"),
    ],
)
def test_what_cannot_vary_is_bad_usage(word: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--vary", word]) == 2
    assert text in capsys.readouterr().err


def test_a_missing_optuna_names_its_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["sweep", "--vary", "depth=1,2"]) == 1
    assert "vit: this needs optuna, which is not installed; run: pip install 'vit-kernels[sweep]'" in (
        capsys.readouterr().err
    )


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_trains_every_combination(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    target = tmp_path / "all.csv"
    words = ["sweep", *FAST, "--sampler", "grid", "--vary", "depth=1,2", "num_heads=2,3", "--csv", str(target)]
    assert main([*words, "--out", str(tmp_path / "sweep"), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    rows = table(target)
    assert sorted((row["depth"], row["num_heads"]) for row in rows) == [("1", "2"), ("1", "3"), ("2", "2"), ("2", "3")]
    failed = [row for row in rows if row["num_heads"] == "3"]  # 16 is no multiple of 3
    assert {row["state"] for row in failed} == {"failed"}
    assert all("num_heads 3" in row["error"] for row in failed)
    whole = {row["depth"]: row for row in rows if row["num_heads"] == "2"}
    assert int(whole["1"]["parameters"]) < int(whole["2"]["parameters"])
    assert all(float(row["latency_ms"]) > 0 and 0 <= float(row["accuracy"]) <= 1 for row in whole.values())
    assert found["best"]["accuracy"] == max(float(row["accuracy"]) for row in whole.values())
    assert "best: trial" in captured.err


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Killed in the middle of its second trial: that one is resumed, and the third draws what it would have drawn."""
    pytest.importorskip("optuna")
    from vit.training import sweep

    words = ["sweep", *FAST, "--vary", "lr=1e-3..1e-2", "--pruner", "none"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main([*words, "--out", str(whole), "--trials", "3", "--csv", str(tmp_path / "whole.csv")]) == 0

    class Killed(BaseException):
        pass

    plain, steps = sweep._Reporter, [0]

    class Reporter(plain):
        def step(self, text: str) -> None:
            steps[0] += 1
            if steps[0] == 14:  # of 9 in each trial
                raise Killed

    monkeypatch.setattr(sweep, "_Reporter", Reporter)
    with pytest.raises(Killed):
        main([*words, "--out", str(part), "--trials", "3"])
    monkeypatch.setattr(sweep, "_Reporter", plain)
    assert main([*words, "--out", str(part), "--trials", "3", "--csv", str(tmp_path / "part.csv")]) == 0
    first, second = table(tmp_path / "whole.csv"), table(tmp_path / "part.csv")
    for name in ("trial", "state", "lr", "accuracy", "test_accuracy", "parameters"):
        assert [row[name] for row in first] == [row[name] for row in second], name
    same_bits(whole / "trial-1", part / "trial-1")
    capsys.readouterr()
    assert main([*words[:-2], "--out", str(part), "--trials", "3"]) == 1
    assert "holds a sweep of other options" in capsys.readouterr().err


def test_a_poor_trial_is_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optuna = pytest.importorskip("optuna")
    from vit.training.sweep import Pruned, _Reporter

    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(2, 0))
    for value in (0.9, 0.8):
        trial = study.ask()
        trial.report(value, 1)
        study.tell(trial, value)
    poor = _Reporter(study.ask(), {}, "accuracy")
    with pytest.raises(Pruned):
        poor.epoch({"epoch": 1, "val_accuracy": 0.1}, 3)
    poor.epoch({"epoch": 3, "val_accuracy": 0.1}, 3)  # nothing is left to save
    good = _Reporter(study.ask(), {}, "accuracy")
    good.epoch({"epoch": 1, "val_accuracy": 0.95}, 3)
