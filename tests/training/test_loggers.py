"""What a training tells beside its result: phases of a step, loggers, validation within an epoch, all weights."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_helpers import SMALL, STEPS, TINY, Hook, figures, same_bits, terminate
from vit.cli import main
from vit.training import Interrupted, Run, train
from vit.training.phases import PHASES, Phases
from vit.training.trackers import named

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
WITHIN = dataclasses.replace(SMALL, val_steps=4)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---- phases ----


def test_phases_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 10.0, 10.5, 11.0, 12.0, 12.25])
    monkeypatch.setattr("vit.training.phases.time.perf_counter", lambda: next(clock))
    phases = Phases(torch.device("cpu"))
    for _ in range(2):
        phases.begin()
        for phase in PHASES:
            phases.mark(phase)
        phases.end()
    assert phases.per_step() == {"data": 750.0, "forward": 1250.0, "backward": 2000.0, "optimizer": 2125.0}
    assert phases.total() == 12.25
    phases.clear()
    assert (phases.per_step(), phases.total()) == ({}, 0.0)


def test_a_training_says_where_its_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", *TINY, "--epochs", "2", "--accumulate", "2", "--out", str(out)]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert all(f"{phase} " in line for line in printed for phase in PHASES)
    for line in lines_of(out)[:2]:
        assert tuple(line["step_ms"]) == PHASES
        assert all(ms > 0 for ms in line["step_ms"].values())
        per_second = 1000 * 256 / sum(line["step_ms"].values())
        assert line["images_per_second"] == pytest.approx(per_second, rel=0.01)
    with Image.open(out / "phases.png") as picture:
        assert picture.size[0] > 300


# ---- loggers ----


def scalars(run: Path) -> dict[str, dict[int, float]]:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboard")


@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_has_the_figures(tmp_path: Path) -> None:
    """What metrics.jsonl says, under the step it is of; an interrupted training leaves each once."""
    config = dataclasses.replace(WITHIN, logger="tensorboard", epochs=3, checkpoint_seconds=1e9)
    with pytest.raises(Interrupted):
        train(config, out=tmp_path / "run", display=Hook(STEPS + 6, terminate))
    train(resume=tmp_path / "run")
    found, lines = scalars(tmp_path / "run"), lines_of(tmp_path / "run")
    for key, tag in (("val_accuracy", "val/accuracy"), ("val_loss", "val/loss"), ("train_loss", "train/loss")):
        wanted = {line["step"]: line[key] for line in lines if key in line and "step" in line}
        assert found[tag].keys() == wanted.keys()
        found[tag].pop(3 * STEPS)  # where the figures of the kept weights follow those of the last epoch
        assert found[tag] == pytest.approx({step: wanted[step] for step in found[tag]})
    assert found["step/loss"].keys() == {20}
    assert {f"time/{phase} (ms)" for phase in PHASES} <= found.keys()
    assert found["test/accuracy"] == pytest.approx({3 * STEPS: lines[-1]["test_accuracy"]})


def test_a_logger_changes_no_bit(tmp_path: Path, tensorboard: None) -> None:
    for name in ("none", "tensorboard"):
        train(dataclasses.replace(SMALL, logger=name, epochs=1), out=tmp_path / name)
    same_bits(tmp_path / "none", tmp_path / "tensorboard")
    train(resume=tmp_path / "none", changes={"logger": "tensorboard"})


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_said_before_the_training(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"{name}.compat", raising=False)
    assert main(["train", *TINY, "--logger", name, "--out", str(tmp_path / "run")]) == 1
    assert f"needs {name}, which is not installed; run: pip install 'vit-kernels[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", "--logger", "board"]) == 2


class Service(types.ModuleType):
    """A stand-in for the module of a service, which keeps what it is told."""

    def __init__(self, name: str, fails: bool = False) -> None:
        super().__init__(name)
        self.started: dict[str, Any] = {}
        self.told: list[tuple[int | None, dict[str, Any]]] = []
        self.finished, self.fails = 0, fails

    def init(self, **about: Any) -> Service:
        self.started = about
        return self

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self.fails:
            raise ConnectionError("no way to the service\nTraceback ...")
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_are_told(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    train(dataclasses.replace(SMALL, logger=name, epochs=1), out=tmp_path / "run")
    assert service.started["project"] == "vit"
    assert service.started["config"]["batch_size"] == SMALL.batch_size
    steps = [step for step, values in service.told if "val/accuracy" in values]
    assert steps == [STEPS, STEPS]  # the epoch, and the end
    assert service.finished == 1


def test_a_logger_that_fails_costs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Service("wandb", fails=True))
    hook = Hook()
    result = train(dataclasses.replace(SMALL, logger="wandb"), out=tmp_path / "run", display=hook)
    assert result.epochs == 2
    said = [line for line in hook.lines if "--logger" in line]
    assert said == ["--logger wandb failed: no way to the service; the training goes on without it"]


def test_names_of_figures() -> None:
    line = {
        "epoch": 1,
        "step": 9,
        "lr": 0.1,
        "train_loss": 2.0,
        "val_accuracy": 0.5,
        "step_ms": {"data": 1.0},
        "final": True,
    }
    assert named(line) == {
        **{"time/data (ms)": 1.0, "run/epoch": 1, "run/lr": 0.1, "train/loss": 2.0, "val/accuracy": 0.5},
    }


# ---- validation within an epoch ----


def test_validation_within_an_epoch(tmp_path: Path) -> None:
    """It has lines of its own, chooses the weights too, and changes nothing of the training."""
    hook = Hook()
    result = train(WITHIN, out=tmp_path / "within", display=hook)
    train(SMALL, out=tmp_path / "plain")
    lines = lines_of(result.run)
    assert [line["step"] for line in lines[:-1]] == [4, 8, 9, 13, 17, 18]
    within = [line for line in lines if "at" in line]
    assert [line["at"] for line in within] == [pytest.approx(step / STEPS, abs=1e-6) for step in (4, 8, 13, 17)]
    assert sum(line.startswith("step 13 (epoch 1.44): ") for line in hook.lines) == 1
    plain = load_file(tmp_path / "plain" / "last.safetensors")
    assert all(torch.equal(plain[key], value) for key, value in load_file(result.run / "last.safetensors").items())
    best = max(lines[:-1], key=lambda line: (line["val_accuracy"], -line["val_loss"]))
    assert (lines[-1]["best_step"], lines[-1]["val_accuracy"]) == (best["step"], best["val_accuracy"])
    assert Run.open(result.run).evaluate("val").accuracy == best["val_accuracy"]


@pytest.mark.parametrize("step", [3, 4, STEPS + 4])
def test_it_resumes_to_the_bit(tmp_path: Path, step: int) -> None:
    """Also a training that was stopped between a step and the validation that follows it."""
    train(WITHIN, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(WITHIN, out=tmp_path / "run", display=Hook(step, terminate))
    train(resume=tmp_path / "run")
    same_bits(tmp_path / "whole", tmp_path / "run")


def test_weights_of_every_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", *TINY, "--epochs", "3", "--keep", "all", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.glob("epoch-*")) == [f"epoch-{n}.safetensors" for n in (1, 2, 3)]
    last, third = (load_file(out / name) for name in ("last.safetensors", "epoch-3.safetensors"))
    assert all(torch.equal(last[key], third[key]) for key in last)
    assert figures(out)[-1]["best_epoch"] in (1, 2, 3)
    capsys.readouterr()
    assert main(["train", "--keep", "some"]) == 2
    assert "must be a whole number or all, got 'some'" in capsys.readouterr().err
