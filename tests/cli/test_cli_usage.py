"""What a command line must not be taken for: empty words, numbers out of range, special files as targets."""

from __future__ import annotations

import os
import select
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import vit
from PIL import Image
from safetensors.torch import save_file
from vit.cli import main
from vit.support.files import write_text
from vit.training.config import read_yaml
from vit.training.record import _sessions
from vit.viz.curves import curves


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--resume", ""],
        ["train", "--out", ""],
        ["train", "--config="],
        ["train", "--recipe", ""],
        ["train", "--data", ""],
        ["train", "--weights", ""],
        ["train", "--task", ""],
        ["train", "--arch", ""],
        ["eval", ""],
        ["eval", "run", "--data", ""],
        ["predict", "run", ""],
        ["predict", "", "a.png"],
        ["predict", "run", "a.png", "--csv", ""],
        ["info", ""],
        ["quantize", "run", "--calibrate", ""],
    ],
    ids=" ".join,
)
def test_an_empty_word_is_bad_usage(words, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("a.png")
    assert main(words) == 2
    assert "error: argument" in capsys.readouterr().err
    assert os.listdir() == ["a.png"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train", "--epochs", "-1"], "argument --epochs: is -1; allowed is any number from 1"),
        (["train", "--lr", "nan"], "argument --lr: is nan; allowed is any number from 0.0"),
        (["train", "--lr", "inf"], "argument --lr: is inf; allowed"),
        (["train", "--seed", "9" * 20], f"argument --seed: is {'9' * 20}; allowed is 0 to"),
        (["train", "--threads", "-1"], "argument --threads: is -1; allowed is 0 to 1024"),
        (["train", "--ema", "1.5"], "argument --ema: is 1.5; allowed is 0.0 to 1.0"),
        (["train", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (
            ["quantize", "r", "--calibrate", "d", "--max-drop", "nan"],
            "argument --max-drop: must be from 0 to 1, got nan",
        ),
        (["quantize", "r", "--calibrate", "d", "--min-cosine", "2"], "argument --min-cosine: must be from -1 to 1"),
        (["train", "--beta2", "1"], "argument --beta2: is 1.0; allowed is 0.0 to 0.999999"),
        (["train", "--bs", "3"], "unknown option --bs; did you mean --batch-size?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_that_are_not_allowed_are_bad_usage(words, text: str, capsys) -> None:
    assert main(words) == 2
    assert text in capsys.readouterr().err


def test_an_option_in_two_spellings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("batch-size: 3\nbatch_size: 4\n")
    with pytest.raises(ValueError, match=r"c\.yaml: 'batch_size' stands twice"):
        read_yaml(path)


def test_no_file_takes_the_place_of_a_device_or_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="pipe is no regular file"):
        write_text(pipe, "x")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_csv_goes_into_a_pipe_and_escaped_onto_a_terminal(tmp_path: Path, monkeypatch) -> None:
    model = vit.create("vit_digits", backend="reference")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    picture = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(picture)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    words = ["predict", str(tmp_path / "w.safetensors"), str(picture), "--model", "vit_digits", "--top", "1"]
    assert main([*words, "--csv", str(pipe)]) == 0
    lines = os.read(reader, 4096).splitlines()
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert len(lines) == 2
    assert lines[1].startswith(os.fsencode(picture) + b",")
    read, write = os.openpty()
    with os.fdopen(write, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        names = tmp_path / "names"
        names.write_text("\x1b[31mred\n" * 10)
        assert main([*words, "--csv", "-", "--class-names", str(names)]) == 0
        shown = b""
        while select.select([read], [], [], 1)[0]:  # a terminal may give line by line
            shown += os.read(read, 4096)
    os.close(read)
    assert rb"\x1b[31mred" in shown
    assert b"\x1b" not in shown


def test_too_little_memory_is_a_text(tmp_path: Path, capsys) -> None:
    words = ["train", "--out", str(tmp_path / "run"), "--arch", "embed_dim=100000000000000", "num_heads=1"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("vit: not enough memory; a smaller model")
    assert error.count("\n") == 1


def test_a_loss_that_is_no_number_does_not_stop_the_curves(tmp_path: Path) -> None:
    final = {"final": True, "test_accuracy": 0.5, "test_loss": None, "test_images": 2, "best_epoch": 1}
    curves([{"epoch": 1, "val_loss": None, "val_accuracy": 0.5, "lr": 1e30}, final], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()


def test_errors_of_the_system_name_the_file_without_their_number(tmp_path: Path, capsys) -> None:
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 1
    assert capsys.readouterr().err == f"vit: {tmp_path / 'none.yaml'}: No such file or directory\n"


@pytest.mark.parametrize("text", ["", "null\n", "data: digits\nepochs: 1\n"])
def test_a_run_whose_config_lost_the_splits_is_damaged(text: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "model.json").write_text('{"name": "vit_digits", "arch": {}, "class_names": [], "preprocess": {}}')
    assert main(["eval", str(tmp_path)]) == 1
    assert "config.yaml is damaged: it lacks" in capsys.readouterr().err


def test_a_damaged_record_of_the_sessions_says_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON.*; nothing but the record .* remove it to go on"):
        _sessions(tmp_path / "run.json")


def test_a_name_in_mplbackend_is_nobodys_concern(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom vit.viz.figure import new_figure, save\n"
        f"save(new_figure(1, 1), Path({str(tmp_path / 'a.png')!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"MPLBACKEND": "no-such"}, timeout=200)
    assert (tmp_path / "a.png").stat().st_size > 100
