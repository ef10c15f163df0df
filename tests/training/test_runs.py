"""Run folders beside each other, and the epochs whose weights are kept."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path

import pytest
import vit
from safetensors.torch import load_file
from training_helpers import SMALL, Hook, figures, terminate
from vit.cli import main
from vit.tasks import get
from vit.training import Interrupted, train
from vit.training.kept import best_epochs

LONG = dataclasses.replace(SMALL, epochs=4, keep=2, ema=0.0, warmup_epochs=0.0, lr=5e-3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, of one and of two epochs, and one that was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    train(dataclasses.replace(SMALL, epochs=1), out=folder / "digits-2")
    train(dataclasses.replace(SMALL, lr=1e-3), out=folder / "digits-10")
    with pytest.raises(Interrupted):
        train(SMALL, out=folder / "deep" / "er", display=Hook(3, terminate))
    return folder


def test_runs_are_listed_with_figures_and_what_differs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs), "--json"]) == 0
    stopped, first, second = json.loads(capsys.readouterr().out)
    assert [Path(row["run"]).name for row in (stopped, first, second)] == ["er", "digits-2", "digits-10"]
    last = figures(runs / "digits-10")
    assert second["test_accuracy"] == last[-1]["test_accuracy"]
    assert second["val_accuracy"] == last[-1]["val_accuracy"]
    assert (second["state"], second["epochs"], second["best_epoch"]) == ("finished", 2, last[-1]["best_epoch"])
    assert (stopped["state"], stopped["epochs"], stopped["test_accuracy"]) == ("interrupted", 0, None)
    assert main(["runs", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("epochs=1 lr=0.002")
    assert lines[3].endswith("epochs=2 lr=0.001")
    assert f"{100 * last[-1]['test_accuracy']:.2f} %" in lines[3]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_runs_are_drawn(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    assert main(["runs", str(runs), "--plot", str(tmp_path / f"all.{suffix}")]) == 0
    assert "3 runs drawn" in capsys.readouterr().out
    assert (tmp_path / f"all.{suffix}").stat().st_size > 5000


def test_a_damaged_run_is_named_and_stops_no_other(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("epochs: many\n")
    assert main(["runs", str(runs / "digits-2"), str(broken), "--json"]) == 1
    captured = capsys.readouterr()
    good, bad = json.loads(captured.out)
    assert good["state"] == "finished"
    assert set(bad) == {"run", "error"}
    assert str(broken) in captured.err


def test_a_folder_without_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 1
    assert "there is no run folder of vit train in" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "none")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["runs", str(tmp_path), "--plot", str(tmp_path / "a.txt")]) == 2


@pytest.mark.parametrize(("pid", "state"), [(os.getpid(), "running"), (2**22 + 1, "finished")], ids=["living", "none"])
def test_a_lock_of_a_living_process_means_running(runs: Path, capsys, pid: int, state: str) -> None:
    lock = runs / "digits-2" / ".lock"
    lock.write_text(json.dumps({"pid": pid, "host": socket.gethostname()}))
    try:
        assert main(["runs", str(runs / "digits-2"), "--json"]) == 0
    finally:
        lock.unlink()
    assert json.loads(capsys.readouterr().out)[0]["state"] == state


# ---- the best epochs ----


def test_the_best_epochs_are_those_of_the_metrics() -> None:
    lines = [
        {"epoch": i + 1, "val_accuracy": a, "val_loss": b}
        for i, (a, b) in enumerate([(0.5, 1.0), (0.9, 0.3), (0.9, 0.2), (0.7, None), (0.9, 0.2)])
    ]
    task = get("classification")
    assert best_epochs(lines, task, 3) == [3, 5, 2]
    assert best_epochs(lines, task, 9) == [3, 5, 2, 4, 1]
    assert best_epochs([{"epoch": 1}, {"epoch": 2}, {"epoch": 3}], task, 2) == [3, 2]


def test_the_best_epochs_are_kept_also_after_an_interruption(tmp_path: Path) -> None:
    whole = train(LONG, out=tmp_path / "whole").run
    with pytest.raises(Interrupted):
        train(LONG, out=tmp_path / "run", display=Hook(31, terminate))  # in the last of four epochs
    part = train(resume=tmp_path / "run").run
    for run in (whole, part):
        wanted = best_epochs(figures(run), get("classification"), 2)
        assert sorted(path.name for path in run.glob("epoch-*")) == sorted(f"epoch-{n}.safetensors" for n in wanted)
        best = load_file(run / "best.safetensors")
        kept = load_file(run / f"epoch-{wanted[0]}.safetensors")
        assert all((best[name] == kept[name]).all() for name in best)
    assert figures(whole) == figures(part)
    model = vit.create(weights=next(part.glob("epoch-*")))
    assert model.num_classes == 10


def test_a_run_that_was_killed_between_its_first_files_starts_anew(tmp_path: Path) -> None:
    """config.yaml and model.json are written before metrics.jsonl."""
    whole = train(SMALL, out=tmp_path / "whole").run
    part = tmp_path / "part"
    part.mkdir()
    for name in ("config.yaml", "model.json"):
        (part / name).write_bytes((whole / name).read_bytes())
    assert figures(train(resume=part).run) == figures(whole)
