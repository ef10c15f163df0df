"""The index of a folder: files that were checked once, what is remembered of them, and when they are checked anew."""

from __future__ import annotations

import csv
import json
import os
import zipfile
from pathlib import Path

import draw
import numpy as np
import pytest
import torch
from PIL import Image
from vit.cli import main
from vit.data import DataError, open_source
from vit.data import folder as folder_module
from vit.data.index import NAME, Index, places
from vit.preprocess import Preprocess
from vit.training.profile import loader_profile

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of six images, of which one of cats is cut off and one of dogs empty."""
    root = tmp_path / "photos"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            pixels = draw.randint(0, 256, (20 + i, 24, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    whole = (root / "cat" / "1.png").read_bytes()
    (root / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "dog" / "2.png").write_bytes(b"")
    return root


def index(root: Path, capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict:
    assert main(["data", "index", str(root), "--json", *words]) == code
    return json.loads(capsys.readouterr().out)


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded from now on."""
    seen: list[Path] = []
    plain = folder_module._Decoder.decode

    def decode(self, path):
        seen.append(path)
        plain(self, path)

    monkeypatch.setattr(folder_module._Decoder, "decode", decode)
    return seen


def test_an_index_names_counts_and_is_used_by_training(photos: Path, capsys, monkeypatch, tmp_path: Path) -> None:
    found = index(photos, capsys, "--labels", str(tmp_path / "labels.csv"))
    assert found["classes"] == ["cat", "dog"]
    assert found["splits"]["train"] == {"images": 10, "per_class": {"cat": 5, "dog": 5}}
    bad = {Path(item["file"]).name: item["reason"] for item in found["bad"]}
    assert bad.keys() == {"1.png", "2.png"}
    assert bad["2.png"] == "the file is empty"
    assert (found["checked"], found["cached"], found["index"]) == (12, 0, str(photos / NAME))
    assert (found["smallest"], found["largest"]) == ([24, 20], [24, 25])
    rows = list(csv.DictReader((tmp_path / "labels.csv").read_text().splitlines()))
    assert rows[0] == {"image": "cat/0.png", "label": "cat", "split": "train"}
    assert len(rows) == 10

    plain = open_source(str(photos))
    seen = decoded(monkeypatch)
    source = open_source(str(photos))
    assert not seen, "the index knows all files"
    assert source.fingerprint() == plain.fingerprint()
    assert sorted(item.reason for item in source.skipped) == sorted(bad.values())
    with pytest.raises(DataError, match="2 unusable files"):
        open_source(str(photos), bad_images="refuse")


def test_files_that_changed_are_checked_anew(photos: Path, capsys, monkeypatch) -> None:
    first = index(photos, capsys)
    seen = decoded(monkeypatch)
    Image.new("RGB", (9, 9)).save(photos / "cat" / "1.png")
    Image.new("RGB", (9, 9)).save(photos / "cat" / "new.png")
    (photos / "dog" / "5.png").write_bytes(b"no picture")
    source = open_source(str(photos))
    assert sorted(path.name for path in seen) == ["1.png", "5.png", "new.png"]
    assert {item.path.name for item in source.skipped} == {"2.png", "5.png"}
    second = index(photos, capsys)
    assert (second["checked"], second["cached"]) == (3, 10)
    assert second["digest"] != first["digest"]
    assert index(photos, capsys)["digest"] == second["digest"]
    assert index(photos, capsys, "--fresh")["checked"] == 13


def test_a_content_that_changed_in_secret_is_found_by_its_checksum(photos: Path, capsys) -> None:
    index(photos, capsys)
    path = photos / "dog" / "0.png"
    before, content = os.stat(path), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert index(photos, capsys)["changed"] == []
    assert index(photos, capsys, "--verify", code=1)["changed"] == ["dog/0.png"]
    assert index(photos, capsys, "--verify")["changed"] == []


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_index_is_not_believed(photos: Path, capsys, monkeypatch, damage: str) -> None:
    index(photos, capsys)
    content = bytearray((photos / NAME).read_bytes())
    if damage == "flip":
        with zipfile.ZipFile(photos / NAME) as archive:
            part = archive.getinfo("names.npy")
        content[part.header_offset + 30 + len("names.npy") + 20 + part.compress_size // 2] ^= 0xFF
    new = {"cut": content[: len(content) // 2], "flip": content, "empty": b"", "text": b"no archive"}[damage]
    (photos / NAME).write_bytes(bytes(new))
    seen = decoded(monkeypatch)
    assert len(open_source(str(photos)).splits["train"]) == 10
    assert len(seen) == 12
    assert index(photos, capsys)["checked"] == 12
    assert Index.of(photos) is not None


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(photos, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("vit.data.index.os.access", lambda path, mode: False)
    assert index(photos, capsys)["index"] == str(places(photos)[1])
    assert not (photos / NAME).exists()
    seen = decoded(monkeypatch)
    open_source(str(photos))
    assert not seen


@pytest.mark.parametrize("data", ["digits", "table.csv", "images.npz"])
def test_other_data_are_counted_too(data: str, tmp_path: Path, capsys, monkeypatch, photos: Path) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"photos/{name}/{i}.png,{name}" for name in ("cat", "dog") for i in range(6)]
    Path("table.csv").write_text("\n".join(["image,label", *lines]))
    np.savez("images.npz", x_train=np.zeros((4, 8, 8), np.uint8), y_train=np.array([0, 1, 0, 1]))
    found = index(Path(data), capsys)
    assert found["images"] == {"digits": 1797, "table.csv": 10, "images.npz": 4}[data]
    assert found["splits"]["train"]["per_class"]
    assert bool(found["index"]) == (data == "table.csv")
    assert main(["data", "index", data]) == 0
    assert "classes" in capsys.readouterr().out


def test_data_that_do_not_exist_are_named(tmp_path: Path, capsys) -> None:
    for what in ("index", "profile"):
        assert main(["data", what, str(tmp_path / "none")]) == 1
        assert "does not exist" in capsys.readouterr().err
    assert main(["data", "sort", "digits"]) == 2


# ---- profile ----


def test_the_profile_has_the_statistics_of_the_pixels(capsys) -> None:
    words = ["data", "profile", "digits", "--batch-size", "599", "--batches", "3", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    pixels = open_source("digits").splits["train"].images / 255  # 3 x 599 are all of them
    assert found["mean"] == [pytest.approx(pixels.mean(), abs=5e-7)]  # six digits are printed
    assert found["std"] == [pytest.approx(pixels.std(), abs=5e-7)]
    assert (found["min"], found["max"]) == ([0.0], [1.0])
    assert found["images_per_second"] > 0
    assert found["images"] == 1797
    assert "data_share" not in found


def test_the_profile_is_of_the_size_that_the_recipe_trains_at(tmp_path: Path, capsys) -> None:
    """Not of its model's own, which for CIFAR is seven times larger on each side."""
    x = draw.randint(0, 256, (20, 32, 32, 3)).numpy().astype(np.uint8)
    np.savez(tmp_path / "images.npz", x_train=x, y_train=np.arange(20) % 2)
    words = ["data", "profile", str(tmp_path / "images.npz"), "--batch-size", "4", "--batches", "1", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["size"] == [32, 32]


def test_the_profile_of_a_step_says_what_it_waits_for(photos: Path) -> None:
    samples = open_source(str(photos)).splits["train"]
    seen = []
    found = loader_profile(samples, Preprocess((16, 16)), None, 4, 0, 5, lambda images: seen.append(images.shape))
    assert seen == [(4, 3, 16, 16)] * 5, "also where an epoch has fewer batches"
    assert 0 < found["data_share"] <= 1
    assert len(found["mean"]) == 3
