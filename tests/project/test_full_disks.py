"""Every file that vit writes, on a disk that takes no more: an error that names the file, and the file before it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vit
from PIL import Image
from training_helpers import SMALL, full_disk
from vit.cli import answers, main, predict, show, submission
from vit.data.index import NAME, Entry, Index
from vit.support import files, tensors
from vit.support.lock import FolderLock
from vit.support.random import Stream
from vit.training.run import Run
from vit.viz import figure

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 2}


@pytest.fixture(scope="module")
def model() -> Any:
    return vit.create("vit_tiny_patch16_224", backend="reference", **SIZES)


def drawn(path: Path) -> None:
    picture = figure.new_figure(3, 2)
    picture.add_subplot().plot(np.arange(100) ** 2)
    figure.save(picture, path)


def table(path: Path) -> None:
    with predict._table(str(path), 1) as write:
        for i in range(200):
            write({"image": f"{i}.png", "top": [{"class": "cat", "index": 0, "probability": 1.0}]})


def answer_sheet(path: Path) -> None:
    with submission.submission(str(path), ["0", "1"]) as write:
        for _ in range(200):
            write({"top": [{"class": "1"}]})


def index(path: Path) -> None:
    entries = {
        str(name): Entry(i, i, i, 8, 8, i, "") for i, name in enumerate(Stream("names").integers(0, 1 << 62, 200))
    }
    Index(path.parent, entries).write()


WRITERS: dict[str, tuple[str, Callable[[Path, Any], object]]] = {
    "checkpoint": ("checkpoint.safetensors", lambda path, model: tensors.write_tensors(path, model.state_dict())),
    "weights": ("config.json", lambda path, model: vit.weights.save(model, path.parent)),
    "engine": ("m.vit", lambda path, model: vit.Engine(model).save(path)),
    "engine, 8 bits": ("m.vit", lambda path, model: vit.Engine(model, "int8").save(path)),
    "metrics": ("metrics.jsonl", lambda path, model: files.append_line(path, "x" * 5000, 0)),
    "JSON": ("report.json", lambda path, model: show.save_json({"records": ["x" * 5000]}, str(path))),
    "CSV": ("answers.csv", lambda path, model: table(path)),
    "submission": ("answers.csv", lambda path, model: answer_sheet(path)),
    "index": (NAME, lambda path, model: index(path)),
    "PNG": ("curves.png", lambda path, model: drawn(path)),
    "SVG": ("curves.svg", lambda path, model: drawn(path)),
    "PDF": ("curves.pdf", lambda path, model: drawn(path)),
    "mask": ("m.png", lambda path, model: answers._write(path.with_suffix(""), {".png": noise()})),
}


def noise() -> Image.Image:
    return Image.fromarray(Stream("noise").integers(0, 256, (64, 64, 3)).astype(np.uint8))


def refusal(write: Callable[[Path, Any], object], path: Path, model: Any) -> str:
    """The text of the OSError that writing ends in."""
    try:
        write(path, model)
    except OSError as error:
        return files.said(error)
    pytest.fail("it was written")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [0, 1000])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_and_damages_nothing(writer: str, size: int, model: Any, tmp_path: Path) -> None:
    name, write = WRITERS[writer]
    path = tmp_path / name
    path.write_bytes(b"before")
    with full_disk(size):
        text = refusal(write, path, model)
    assert str(path) in text
    assert "\n" not in text
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path], "nothing else is there"
    write(path, model)
    assert path.read_bytes() != b"before"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_cannot_be_written_is_named(writer: str, model: Any) -> None:
    """/sys: not even root makes files there."""
    name, write = WRITERS[writer]
    path = Path("/sys") / name
    if writer == "index":
        pytest.skip("an index goes to the cache then")
    text = refusal(write, path, model)
    assert str(path) in text
    assert "\n" not in text


@pytest.mark.parametrize(("room", "name"), [(10, "model.json"), (40, "config.yaml")])
def test_a_run_folder_is_made_whole_or_not_at_all(tmp_path: Path, room: int, name: str) -> None:
    with full_disk(room), pytest.raises(OSError, match=re.escape(name)):
        Run.create(tmp_path / "run", SMALL, {"name": "x"})
    assert not list((tmp_path / "run").iterdir())


def test_a_lock_needs_no_room(tmp_path: Path) -> None:
    with full_disk(0), FolderLock(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_weights_and_their_config_stay_together(model: Any, tmp_path: Path) -> None:
    vit.weights.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = vit.create("vit_tiny_patch16_224", backend="reference", **SIZES | {"num_classes": 3})
    with full_disk(len(before["config.json"]) + 500), pytest.raises(OSError, match=r"model\.safetensors"):
        vit.weights.save(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_command_says_it_in_one_line(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit.weights.save(model, tmp_path / "weights")
    noise().save(tmp_path / "a.png")
    out = tmp_path / "out"
    commands = {
        "config.json": ["convert", str(tmp_path / "weights"), str(out)],
        "a.csv": ["predict", str(tmp_path / "weights"), str(tmp_path / "a.png"), "--csv", str(tmp_path / "a.csv")],
        "f.png": ["viz", "filters", str(tmp_path / "weights"), "--output", str(tmp_path / "f.png")],
    }
    for name, words in commands.items():
        with full_disk(10):
            code = main(words)
        error = capsys.readouterr().err
        assert code == 1
        assert error.startswith("vit: ")
        assert name in error
        assert error.count("\n") == 1, error


def test_a_sweep_on_a_full_disk_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    words = ["sweep", "--arch", "embed_dim=16", "depth=1", "num_heads=2", "--epochs", "1", "--vary", "lr=0.001,0.002"]
    words += ["--sampler", "grid", "--out", str(tmp_path / "sweep")]
    with full_disk(8192):
        assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("vit: ")
    assert "sweep.db" in error
    assert error.count("\n") == 1, error
    assert torch.is_grad_enabled()
