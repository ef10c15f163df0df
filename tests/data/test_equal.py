"""Pictures that are in two splits: how many there are is said, with the names of one in both."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import draw
import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import SMALL, Hook
from vit.cli import main
from vit.data import folder as folder_module
from vit.data import open_source
from vit.data.equal import mark_of, shared_with_training
from vit.training import train
from vit.training.assembly import open_data
from vit.training.config import TrainConfig


def picture(*size: int) -> Image.Image:
    return Image.fromarray(draw.randint(0, 256, (*size, 3), dtype=torch.uint8).numpy())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """train/ and test/ of two classes, of which one test image is a copy, and another one the same pixels in BMP."""
    root = tmp_path / "photos"
    for split, count in (("train", 4), ("test", 3)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(12, 16).save(root / split / name / f"{i}.png")
    shutil.copy(root / "train" / "cat" / "2.png", root / "test" / "cat" / "copy.png")
    Image.open(root / "train" / "dog" / "1.png").save(root / "test" / "dog" / "0.bmp")
    return root


def told(config: TrainConfig) -> list[str]:
    lines: list[str] = []
    open_data(config, lines.append)
    return [line for line in lines if line.startswith("equal pictures")]


def config_of(root: Path, **options: object) -> TrainConfig:
    from vit.data import recipe_of

    return TrainConfig(data=str(root), **options).resolved(recipe_of(str(root)))


EXPECTED = (
    "equal pictures: 2 of 8 test images (test/cat/copy.png = train/cat/2.png) are training images, too; their figures "
    "flatter the model"
)


def test_copies_in_a_folder_are_said_once(photos: Path) -> None:
    assert told(config_of(photos, val_fraction=0.0)) == [EXPECTED]
    for path in (photos / "test").rglob("*"):
        if path.name in ("copy.png", "0.bmp"):
            path.unlink()
    assert told(config_of(photos, val_fraction=0.0)) == []


def test_an_index_knows_them_without_another_look(photos: Path, capsys, monkeypatch) -> None:
    assert main(["data", "index", str(photos)]) == 0
    assert EXPECTED in capsys.readouterr().out
    monkeypatch.setattr(folder_module._Decoder, "decode", lambda self, path: pytest.fail("the index knows all files"))
    assert told(config_of(photos, val_fraction=0.0)) == [EXPECTED]
    assert told(config_of(photos, val_fraction=0.0, validate="header")) == [EXPECTED]
    assert main(["data", "index", str(photos), "--json"]) == 0
    found = {"split": "test", "other": "train", "count": 2, "of": 8, "names": ["test/cat/copy.png", "train/cat/2.png"]}
    assert json.loads(capsys.readouterr().out)["equal"] == [found]


def test_headers_alone_say_nothing(photos: Path) -> None:
    assert told(config_of(photos, val_fraction=0.0, validate="header")) == []


def test_a_folder_without_splits_says_what_is_there_twice(photos: Path, capsys) -> None:
    shutil.copy(photos / "train" / "cat" / "0.png", photos / "train" / "dog" / "other.png")
    assert main(["data", "index", str(photos / "train")]) == 0
    assert "equal pictures: 1 of 9 train images (dog/other.png = cat/0.png) are there more than once" in (
        capsys.readouterr().out
    )


def test_copies_on_both_sides_of_a_drawn_split_are_said(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            picture(8, 8).save(root / name / f"{i}.png")
            shutil.copy(root / name / f"{i}.png", root / name / f"{i}-copy.png")
    (line,) = told(config_of(root, val_fraction=0.1, test_fraction=0.2))
    assert " val images (" in line
    assert " test images (" in line


def test_arrays_and_shards_are_compared_by_their_pixels(tmp_path: Path) -> None:
    images = draw.randint(0, 256, (12, 8, 8), dtype=torch.uint8).numpy()
    labels = np.arange(12) % 2
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images[3:5], y_test=labels[3:5])
    expected = "2 of 2 test images (test-0 = train-3)"
    assert expected in told(config_of(tmp_path / "a.npz", val_fraction=0.0))[0]

    for split, chosen in (("train", range(12)), ("test", (5, 6))):
        with tarfile.open(tmp_path / f"{split}-000.tar", "w") as archive:
            for i in chosen:
                content = io.BytesIO()
                Image.fromarray(images[i]).save(content, "PNG" if split == "train" else "BMP")
                for name, data in ((f"{i}.png", content.getvalue()), (f"{i}.cls", str(labels[i]).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    (tmp_path / "a.npz").unlink()
    expected = "2 of 2 test images (test-000.tar/5.png = train-000.tar/5.png)"
    assert expected in told(config_of(tmp_path, val_fraction=0.0))[0]


def test_what_differs_has_another_mark() -> None:
    """Size, mode and palette belong to a picture; large ones are read in strips."""
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    painted, other = grey.convert("P"), grey.convert("P")
    painted.putpalette([i % 251 for i in range(768)])
    other.putpalette([i % 241 for i in range(768)])
    large = picture(700, 900)
    changed = large.copy()
    changed.putpixel((899, 699), (1, 2, 3))
    other_size = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(4, 16))
    found = [grey, other_size, grey.convert("RGB")]
    marks = [mark_of(image) for image in (*found, painted, other, large, changed)]
    assert len(set(marks)) == len(marks)
    assert mark_of(large.copy()) == mark_of(large)


def test_a_training_says_it_and_digits_have_none(tmp_path: Path) -> None:
    hook = Hook()
    train(SMALL, out=tmp_path / "run", display=hook)
    assert not [line for line in hook.lines if line.startswith("equal pictures")]
    assert shared_with_training(open_source("digits").divided(0.1, 0.2, 0).splits) == []


def test_a_large_array_is_not_read_for_this_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.stack([np.asarray(picture(8, 8)) for _ in range(4)])
    for split, rows in (("train", images), ("test", images[:2])):
        np.save(tmp_path / f"x_{split}.npy", rows)
        np.save(tmp_path / f"y_{split}.npy", np.arange(len(rows)) % 2)
    (found,) = shared_with_training(open_source(str(tmp_path)).splits)
    assert (found.split, found.count, found.of) == ("test", 2, 2)
    monkeypatch.setattr("vit.data.equal.MOST_BYTES", images[:2].nbytes - 1)
    assert shared_with_training(open_source(str(tmp_path)).splits) == []
