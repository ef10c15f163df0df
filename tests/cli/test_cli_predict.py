"""`vit predict` and `vit eval` on what people have: folders, weights, names in any encoding, broken images."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm.data
import vit
from PIL import Image
from safetensors.torch import save_file
from vit.cli import main

NAMES = ["zero", "äpfel", "\x1b[31mred", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `vit.create` takes, of a model that knows its classes."""
    path = tmp_path_factory.mktemp("weights")
    model = vit.create("vit_digits", backend="reference")
    save_file(model.state_dict(), path / "best.safetensors")
    record = {"name": "vit_digits", "arch": {}, "class_names": NAMES, "preprocess": model.preprocess.to_dict()}
    (path / "model.json").write_text(json.dumps(record))
    return path


def pictures(root: Path, *names: str) -> list[str]:
    root.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 30 * i).save(root / name)
    return [str(root / name) for name in names]


def vit_process(*words: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "vit", *words], capture_output=True, env=os.environ | environment, timeout=200
    )


def test_a_broken_image_is_its_own_failure(weights: Path, tmp_path: Path, capsys) -> None:
    good = pictures(tmp_path, "a.png", "c.png")
    (tmp_path / "bad.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (tmp_path / "long.png").write_bytes(b"")
    Image.new("L", (60000, 1)).save(tmp_path / "thin.png")
    os.mkfifo(tmp_path / "fifo.png")
    words = [good[0], *(str(tmp_path / f"{name}.png") for name in ("bad", "thin", "long", "fifo")), good[1]]
    assert main(["predict", str(weights), *words, "--json", "--csv", str(tmp_path / "t.csv")]) == 1
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert [answer["image"] for answer in record["predictions"]] == [good[0], words[2], good[1]]
    assert [Path(failure["image"]).name for failure in record["failed"]] == ["bad.png", "long.png", "fifo.png"]
    assert "Traceback" not in captured.err
    assert "3 of 6 images could not be read" in captured.err
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["image"] for row in rows] == words, "a line per image, in the order given"
    assert "is a pipe" in rows[4]["error"]
    assert rows[4]["class"] == ""


def test_a_folder_is_all_images_below_it(weights: Path, tmp_path: Path, capsys) -> None:
    pictures(tmp_path / "photos", "b.png", "a.jpg", "deep/er/c.png", ".hidden.png")
    (tmp_path / "photos" / "notes.txt").write_text("x")
    assert main(["predict", str(weights), str(tmp_path / "photos"), "--csv", "-", "--top", "2"]) == 0
    captured = capsys.readouterr()
    rows = list(csv.reader(captured.out.splitlines()))
    assert rows[0] == ["image", "class", "index", "probability", "class_2", "index_2", "probability_2", "error"]
    assert [Path(row[0]).name for row in rows[1:]] == ["a.jpg", "b.png", "c.png"]
    assert all(NAMES[int(row[2])] == row[1] and 0 <= float(row[6]) <= float(row[3]) <= 1 for row in rows[1:])
    assert "1 files are no images by their names" in captured.err
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(weights), str(tmp_path / "empty")]) == 1
    assert "empty: is a folder without images" in capsys.readouterr().err
    assert main(["predict", str(weights), "x.png", "--csv", "-", "--json"]) == 2


def test_names_are_printed_whatever_the_encoding(weights: Path, tmp_path: Path) -> None:
    pictures(tmp_path, "ä.png")
    odd = os.fsencode(tmp_path) + b"/\xff\x1b.png"
    os.rename(os.fsencode(tmp_path / "ä.png"), odd)
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"PYTHONUTF8": "0", "LC_ALL": "C"}):
        done = vit_process("predict", str(weights), odd, "--top", "10", **environment)
        assert done.returncode == 0, done.stderr
        assert done.stderr == b""
        assert rb"\x1b.png" in done.stdout
        assert rb"\x1b[31mred" in done.stdout
        assert b"\x1b" not in done.stdout, "no escape sequence of a foreign file reaches the terminal"
        assert b"pfel" in done.stdout


@pytest.mark.parametrize("how", ["| head -n 1", ">&-", "> /dev/full"])
def test_an_output_that_takes_no_more_is_no_traceback(weights: Path, tmp_path: Path, how: str) -> None:
    (name,) = pictures(tmp_path, "a.png")
    command = f"{sys.executable} -m vit predict {weights} {' '.join([name] * 50)} {how}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=200)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    why = {"> /dev/full": "No space left", ">&-": "standard output is closed"}.get(how)
    if why:
        assert done.returncode == 1
        assert why in done.stderr


def test_weights_of_imagenet_answer_with_its_names(tmp_path: Path, capsys) -> None:
    model = vit.create("vit_tiny_patch16_224", backend="reference", embed_dim=12, depth=1, num_heads=1, img_size=32)
    record = {"name": "vit_tiny_patch16_224", "preprocess": None, "class_names": None}
    record["arch"] = {"embed_dim": 12, "depth": 1, "num_heads": 1, "img_size": 32}
    save_file(model.state_dict(), tmp_path / "best.safetensors")
    (tmp_path / "model.json").write_text(json.dumps(record))
    (name,) = pictures(tmp_path, "a.png")
    assert main(["predict", str(tmp_path), name, "--json"]) == 0
    captured = capsys.readouterr()
    info = timm.data.ImageNetInfo("imagenet-1k")
    for entry in json.loads(captured.out)["predictions"][0]["top"]:
        assert entry["class"] == info.index_to_description(entry["index"])
    assert "1000 of them are taken for ImageNet's" in captured.err
    assert main(["predict", str(tmp_path), name, "--json", "--class-names", "numbers"]) == 0
    for entry in json.loads(capsys.readouterr().out)["predictions"][0]["top"]:
        assert entry["class"] == str(entry["index"])
    # Folders called by WordNet numbers, some of the classes only
    pictures(tmp_path / "val", "n01443537/a.png", "n01440764/a.png", "n01440764/b.png")
    assert main(["eval", str(tmp_path), "--data", str(tmp_path / "val"), "--json"]) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert (figures["images"], figures["classes"]) == (3, 1000)
    assert "holds 2 of the model's 1000 classes: n01440764, n01443537" in captured.err


def test_eval_of_weights_counts_classes_by_name(weights: Path, tmp_path: Path, capsys) -> None:
    pictures(tmp_path / "data", "seven/a.png", "three/a.png", "three/b.png")
    assert main(["predict", str(weights), *(str(p) for p in sorted(tmp_path.rglob("*.png"))), "--json"]) == 0
    top = {a["image"]: a["top"][0]["class"] for a in json.loads(capsys.readouterr().out)["predictions"]}
    right = sum(Path(image).parent.name == name for image, name in top.items())
    assert main(["eval", str(weights), "--data", str(tmp_path / "data"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["accuracy"] == pytest.approx(right / 3)
    assert "holds 2 of the model's 10 classes: three, seven" in captured.err
    assert main(["eval", str(weights)]) == 2
    assert "give images with --data" in capsys.readouterr().err
    pictures(tmp_path / "data", "tree/a.png")
    assert main(["eval", str(weights), "--data", str(tmp_path / "data")]) == 1
    assert "tree is not a class of the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train", "--learning-rate", "1"], "unknown option --learning-rate; did you mean --lr"),
        (["train", "--warm", "1"], "unknown option --warm; did you mean --warmup-epochs"),
        (["train", "--epoch=3"], "unknown option --epoch; did you mean --epochs"),
        (["train", "--batch_size", "3"], "unknown option --batch_size; did you mean --batch-size"),
        (["predict", "a", "b", "--tpo", "3"], "unknown option --tpo; did you mean --top"),
        (["eval", "run", "--js"], "unknown option --js; did you mean --json"),
        (["eval", "run", "again"], "unexpected argument again"),
        (["info", "--bakend", "cpu"], "unknown option --bakend; did you mean --backend"),
        (["quantize", "run", "--calib", "x"], "--calibrate"),
    ],
    ids=str,
)
def test_unknown_options_name_the_nearest_and_none_is_abbreviated(words, text, capsys) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert text in error
    if "quantize" not in words:
        assert len(error.splitlines()) == 2
