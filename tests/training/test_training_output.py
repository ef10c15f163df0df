"""What a training shows and leaves: lines in a log, the run record, pictures, intervals, recipes, empty splits."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vit
import yaml
from PIL import Image
from rounding import about
from safetensors.torch import load_file, save_file
from training_helpers import SMALL, STEPS, TINY, Hook, figures, same_bits
from vit import tasks
from vit.cli import main
from vit.tasks.classification import wilson
from vit.training import Run, TrainConfig, TrainResult, train
from vit.training.config import from_mapping, recipe_options
from vit.training.optim import used_decay
from vit.training.progress import Lines
from vit.training.recipes import get_recipe, recipes
from vit.viz import curves

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A short training with pictures in two formats."""
    return train(dataclasses.replace(SMALL, figures="svg"), out=tmp_path_factory.mktemp("whole") / "run")


# ---- lines ----


def test_a_log_tells_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("vit.training.progress.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    lines = Lines(stream)
    lines.start(100, 1100, images=64, seconds=30.0)
    for _ in range(100):
        clock[0] += 1.0
        lines.step("loss 2.3000  lr 1.00e-03")
    told = stream.getvalue().splitlines()
    assert [line.split()[1] for line in told] == ["101/1,100", "131/1,100", "161/1,100", "191/1,100"]
    assert told[1] == "step 131/1,100  loss 2.3000  lr 1.00e-03  64 images/s  0:16:09 left"


def test_a_pipe_shows_the_first_step_and_the_number_of_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", *TINY, "--epochs", "1", "--log-seconds", "0", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "10 classes" in lines[0]
    assert lines[1] == "classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert "1 thread," in lines[2]
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == STEPS
    assert all(word in steps[0] for word in ("step 1/9", "loss ", "lr ", "images/s", "left"))


def test_a_foreign_name_cannot_steer_the_terminal() -> None:
    stream = io.StringIO()
    Lines(stream).line("skipped \x1b[2Jcat\n.png")
    assert stream.getvalue() == "skipped \\x1b[2Jcat\\n.png\n"


# ---- splits of no image ----


def test_without_validation_the_last_weights_are_kept(tmp_path: Path) -> None:
    result = train(dataclasses.replace(SMALL, val_fraction=0.0), out=tmp_path / "run")
    assert result.best_epoch == 2
    lines = figures(result.run)
    assert not [key for line in lines[:2] for key in line if key.startswith("val_")]
    assert lines[-1]["best_epoch"] == 2
    assert lines[-1]["val_images"] == 0
    best, last = (load_file(result.run / f"{name}.safetensors") for name in ("best", "last"))
    assert all(torch.equal(tensor, last[name]) for name, tensor in best.items())
    assert Run.open(result.run).evaluate().accuracy == lines[-1]["test_accuracy"]
    with pytest.raises(ValueError, match=r"the val split of .* holds no usable image"):
        Run.open(result.run).evaluate("val")


def test_without_a_test_there_is_no_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All images but the validation's are trained on; or all of them."""
    for words, sizes in (([], "1,618 train, 179 val, 0 test"), (["--val-fraction", "0"], "1,797 train, 0 val, 0 test")):
        out = tmp_path / f"run{len(words)}"
        arguments = [*TINY, "--epochs", "1", "--test-fraction", "0", *words, "--out", str(out), "--json"]
        assert main(["train", *arguments]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out.splitlines()[-1])["test_accuracy"] is None
        assert "no test images" in captured.err
        assert sizes in captured.err
        assert not [key for key in figures(out)[-1] if key.startswith("test_")]
        assert not (out / "confusion.png").exists()
        assert main(["train", "--resume", str(out)]) == 0
        assert main(["eval", str(out), "--split", "all"]) == 0
        capsys.readouterr()


# ---- weights of another model ----


@pytest.mark.parametrize(
    ("model", "arch", "fitting"),
    [
        ("vit_tiny_patch16_224", {}, "vit_tiny_patch16_224"),
        ("vit_small_patch32_224", {"depth": 12}, "vit_small_patch32_224"),
        ("vit_tiny_patch16_384", {}, "vit_tiny_patch16_384"),
    ],
)
def test_weights_of_another_model_name_theirs(
    tmp_path: Path, model: str, arch: dict[str, Any], fitting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(vit.create(model, backend="reference", num_classes=7, **arch).state_dict(), path)
    assert main(["train", "--weights", str(path), "--out", str(tmp_path / "run")]) == 1
    assert f"fits --model {fitting}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- the averaged weights ----


def test_the_decay_that_runs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert used_decay(0.995, 1789) < 0.995 == used_decay(0.995, 1790)
    assert used_decay(0.9, 79) < 0.9 == used_decay(0.9, 80)
    hook = Hook()
    result = train(SMALL, out=tmp_path / "run", display=hook)
    expected = [(1 + step) / (10 + step) for step in (STEPS, 2 * STEPS)]
    assert [line["ema_decay"] for line in figures(result.run)[:2]] == expected
    assert any(f"reaches {expected[1]:.4f} in these 18 steps, not the 0.995 of --ema" in line for line in hook.lines)
    hook = Hook()
    train(dataclasses.replace(SMALL, ema=0.5, epochs=1), out=tmp_path / "half", display=hook)
    assert not [line for line in hook.lines if "averaged weights" in line]
    main(["train", "--help"])
    assert "min(this, (1 + t) / (10 + t))" in " ".join(capsys.readouterr().out.split())


# ---- the run folder ----


def test_the_run_record_says_how_the_run_was_made(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *TINY, "--epochs", "1", "--out", str(run)]) == 0
    record = json.loads((run / "run.json").read_text())
    (session,) = record["sessions"]
    assert session["command"] == sys.argv
    assert session["versions"]["vit"] == vit.__version__
    assert session["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "accelerate"} <= session["versions"].keys()
    assert session["config_sha256"] == hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    assert session["backends"].keys() == set(session["plan"].values())
    assert session["host"]["name"]
    assert session["started"] <= session["ended"]
    assert (session["outcome"], session["from_step"], session["to_step"]) == ("finished", 0, STEPS)


def test_training_and_validation_are_measured_alike(tmp_path: Path) -> None:
    """Without smoothing, augmentation and stochastic depth the two criteria are one."""
    config = dataclasses.replace(SMALL, epochs=1, augment="none", drop_path=0.0, label_smoothing=0.0)
    line = figures(train(config, out=tmp_path / "plain").run)[0]
    assert line["train_cross_entropy"] == about(line["train_loss"], 8)
    assert 0.0 <= line["train_accuracy"] <= 1.0
    smoothed = figures(train(dataclasses.replace(config, label_smoothing=0.3), out=tmp_path / "smoothed").run)[0]
    assert smoothed["train_cross_entropy"] != smoothed["train_loss"]


def test_pictures_have_the_format_asked_for(whole: TrainResult, tmp_path: Path) -> None:
    for name in ("curves", "confusion"):
        assert "<svg" in (whole.run / f"{name}.svg").read_text()
        with Image.open(whole.run / f"{name}.png") as picture:
            assert picture.size[0] > 300
    text = (whole.run / "curves.svg").read_text()
    curves(Run.open(whole.run).read_metrics(), tmp_path / "curves.svg", tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")
    for words in ("cross entropy", "error, %", "learning rate", "training (augmented images)", "test error"):
        assert f">{words}" in text, words


def test_no_error_at_all_can_be_drawn(tmp_path: Path) -> None:
    """A logarithmic axis has no zero."""
    line = {"epoch": 1, "lr": 1.0, "train_loss": 0.5, "train_cross_entropy": 0.1, "train_accuracy": 1.0}
    curves([line | {"val_loss": 0.1, "val_accuracy": 1.0}], tmp_path / "curves.png")
    curves([line], tmp_path / "curves.png")
    curves([], tmp_path / "curves.png")


def test_the_interval_is_wilsons() -> None:
    low, high = wilson(1.0, 179)
    assert (round(100 * low, 1), high) == (97.9, 1.0)
    low, high = wilson(81 / 263, 263)  # 0.2553, 0.3662: Newcombe 1998, Statistics in Medicine 17, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_the_kept_epoch_is_named_with_its_interval(tmp_path: Path) -> None:
    hook = Hook()
    train(dataclasses.replace(SMALL, epochs=1), out=tmp_path / "run", display=hook)
    (line,) = [line for line in hook.lines if line.startswith("kept epoch 1: ")]
    assert "95 % interval" in line
    assert "on 179 validation images" in line


def test_what_is_better() -> None:
    task = tasks.get("classification")
    old = {"accuracy": 0.5, "loss": 1.0}
    assert task.better({"accuracy": 0.6, "loss": 9.0}, old)
    assert task.better({"accuracy": 0.5, "loss": 0.9}, old)
    assert not task.better(old, old)
    assert not task.better({"accuracy": 0.5, "loss": math.nan}, old)
    assert task.better(old, {"accuracy": 0.5, "loss": math.nan})
    assert tasks.names() == ["classification", "depth", "multi_label", "pose", "segmentation"]
    with pytest.raises(ValueError, match="unknown task 'flow'; known are classification"):
        train(TrainConfig(task="flow"))


# ---- recipes ----


def test_recipes_are_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"digits", "folder", "mnist", "kaggle_digits", "cifar10", "deit3_s16_in1k", "linear_probe"} <= set(recipes())
    assert main(["train", "--list-recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(recipes())
    assert main(["train", "--list-recipes", "--json"]) == 0
    listed = {recipe["name"]: recipe for recipe in json.loads(capsys.readouterr().out)}
    assert list(listed) == list(recipes())
    assert all(recipe.keys() >= {"task", "data", "metric", "expected", "minutes"} for recipe in listed.values())
    assert listed["mnist"]["options"] == get_recipe("mnist").options
    assert main(["train", "--recipe", "mnits"]) == 1
    assert "there is no recipe 'mnits'; known are cifar10, " in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_recipe_says_what_its_model_and_schedule_are(name: str) -> None:
    config = from_mapping(recipe_options(name), name)
    assert None not in (config.epochs, config.batch_size, config.lr, config.warmup_epochs, config.augment)
    task = tasks.get(config.task)
    vit.create(config.model, device="meta", **(task.arch | task.head | {"num_classes": 10} | config.arch))


def test_data_of_a_file_that_there_are_not_are_refused_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "all.yaml"
    file.write_text("data: nowhere\n")
    for words in (["train"], ["train", "--print-config"], ["sweep", "--vary", "lr=1e-4,1e-3"]):
        assert main([*words, "--config", str(file)]) == 1
        assert re.search(r"data 'nowhere' does not exist.*\(in .*all\.yaml\)", capsys.readouterr().err)
    assert main(["train", "--print-config", "--config", str(file), "--data", "digits"]) == 0


def test_the_printed_configuration_is_the_one_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--recipe", "mnist", *TINY, "--epochs", "1"]
    assert main([*words, "--print-config"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["model"] == "vit_mnist_demo"
    assert yaml.safe_load(text)["lr"] == 2e-3
    assert yaml.safe_load(text)["batch_size"] == 128
    (tmp_path / "printed.yaml").write_text(text)
    words += ["--arch", "img_size=8", "patch_size=2", "--threads", "1"]
    (tmp_path / "printed.yaml").write_text(
        text.replace("threads: auto", "threads: 1").replace(
            "num_heads: 2", "num_heads: 2\n  img_size: 8\n  patch_size: 2"
        )
    )
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert main(["train", "--config", str(tmp_path / "printed.yaml"), "--out", str(tmp_path / "two")]) == 0
    same_bits(tmp_path / "one", tmp_path / "two")


def test_automatic_threads_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--epochs", "1", "--threads", "auto", "--out", str(tmp_path / "run")]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["threads"] == 1, "a small model"
    assert main(["train", "--threads", "some"]) == 2
    assert "must be a whole number or auto, got 'some'" in capsys.readouterr().err
