"""Depth: figures, maps that move with their images, folders of maps, and trainings from the command line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import about
from training_helpers import Hook, figures, same_bits, summary, terminate
from vit.cli import main
from vit.data import DataError, Samples, open_source
from vit.data.augment import Affine, CropFlip
from vit.data.loader import Images
from vit.data.sources import rooms
from vit.data.targets import Depths
from vit.preprocess import Preprocess
from vit.tasks import get
from vit.tasks.depth import UNIT
from vit.training import Interrupted, TrainConfig, train

TASK = get("depth")
SMALL = TrainConfig(
    data="rooms",
    task="depth",
    model="vit_tiny_patch16_224",
    arch={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "decoder": [8]},
    epochs=2,
    batch_size=128,
    threads=1,
    warmup_epochs=0.0,
    augment="crop",
    checkpoint_seconds=1e9,
)


def test_the_figures_are_those_of_their_definitions() -> None:
    depths = torch.tensor(
        [[[1000.0, 2000.0], [0.0, 4000.0]], [[500.0, 500.0], [500.0, 500.0]], [[0.0, 0.0], [0.0, 0.0]]]
    )
    answers = torch.tensor(
        [[[1100.0, 2600.0], [9.0, 4000.0]], [[600.0, 500.0], [500.0, 700.0]], [[1.0, 2.0], [3.0, 4.0]]]
    )
    found = summary(TASK, (answers / UNIT).log()[:, None], depths)
    first, second = [1100 / 1000, 2600 / 2000, 1.0], [600 / 500, 1.0, 1.0, 700 / 500]
    relative = [np.mean(np.abs(np.array(part) - 1)) for part in (first, second)]
    assert found.absrel == about(np.mean(relative))
    assert found.delta1 == found.accuracy == pytest.approx((2 / 3 + 3 / 4) / 2)
    invariant = [np.mean(np.log(part) ** 2) - np.mean(np.log(part)) ** 2 / 2 for part in (first, second)]
    assert found.loss == about(np.mean(invariant))
    assert found.images == 3
    loss = TASK.loss((answers / UNIT).log()[:2, None], depths[:2], 0.0)
    assert loss.item() == about(found.loss)
    assert TASK.monitor((answers / UNIT).log()[:2, None], depths[:2]).tolist() == about([found.loss, found.delta1])
    assert summary(TASK, torch.zeros(1, 1, 2, 2), depths[2:]).loss == 0.0
    with pytest.raises(ValueError, match="has a loss of its own; leave out --loss bce"):
        TASK.loss(answers[:, None], depths, 0.0, "bce")


@pytest.mark.parametrize("augment", [None, Affine(), CropFlip((16, 16))], ids=["none", "affine", "crop"])
def test_maps_move_as_their_images_do(augment: object) -> None:
    """A picture whose brightness is its depth, which 8 bits would not hold."""
    depths = np.full((24, 30), 20000, np.uint16)
    depths[5:19, 4:14], depths[8:20, 18:27] = 45000, 60000
    samples = Samples((depths // 256).astype(np.uint8)[None], np.zeros(1, np.int64), ["0"], Depths(depths[None]))
    images = Images(samples, Preprocess((16, 16), in_chans=1, mean=(0.0,), std=(1.0,)), augment, 3)
    agreed = []
    for epoch in range(10):
        pixels, found = images[epoch, 0]
        assert set(found.unique().tolist()) <= {0.0, 20000.0, 45000.0, 60000.0}
        known = found > 0
        assert known.all() or isinstance(augment, Affine)
        levels = torch.tensor([20000.0, 45000.0, 60000.0])
        seen = levels[(255 * pixels[0][..., None] - levels / 256).abs().argmin(dim=2)]
        agreed.append((seen == found)[known].float().mean().item())
    assert np.mean(agreed) > 0.86, "edges of the blended picture are between two depths"


def write(root: Path, count: int = 4) -> None:
    for name in ("images", "depths"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        picture, depths = rooms.draw(i)
        Image.fromarray(picture).save(root / "images" / f"{i}.jpg")
        Image.fromarray(depths).save(root / "depths" / f"{i}.png")


def test_folders_of_maps_are_read(tmp_path: Path) -> None:
    write(tmp_path, 6)
    source = open_source(str(tmp_path))
    assert (source.kind, source.class_names, len(source.splits["train"])) == ("depth_folders", ("depth",), 6)
    for i in range(6):  # all 16 bits
        np.testing.assert_array_equal(np.asarray(source.splits["train"].targets.picture(i)), rooms.draw(i)[1])
    maps = tmp_path / "depths"
    Image.new("L", (31, 32), 1).save(maps / "0.png")
    Image.new("L", (32, 32), 0).save(maps / "1.png")
    Image.new("RGB", (32, 32)).save(maps / "2.png")
    Image.fromarray(np.full((32, 32), math.nan, np.float32)).save(maps / "3.tiff")
    (maps / "3.png").unlink()
    (maps / "4.png").unlink()
    source = open_source(str(tmp_path))
    assert source.splits["train"].keys == ["images/5.jpg"]
    reasons = {item.path.name: item.reason for item in source.skipped}
    assert reasons["0.jpg"] == "its map of depths is 31 x 32, the image 32 x 32"
    assert reasons["1.jpg"] == "its map of depths knows no pixel: all are 0"
    assert "mode RGB; a map of depths is grey" in reasons["2.jpg"]
    assert "below 0 or no number" in reasons["3.jpg"]
    assert "there is no map of depths of its name" in reasons["4.jpg"]
    with pytest.raises(DataError, match="5 unusable files"):
        open_source(str(tmp_path), bad_images="refuse")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(SMALL, out=tmp_path_factory.mktemp("depth") / "run").run


def test_a_training_goes_on_to_the_bit(run: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(SMALL, out=tmp_path / "part", display=Hook(9, terminate))
    same_bits(run, train(resume=tmp_path / "part").run)
    lines = figures(run)
    assert {"train_scale_invariant_loss", "train_delta1", "val_delta1", "val_absrel"} <= lines[0].keys()
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    for name in ("depths.png", "curves.png"):
        assert (run / name).stat().st_size > 5000
    with pytest.raises(ValueError, match=r"rooms has depths, .* give --task depth"):
        train(dataclasses.replace(SMALL, task="segmentation"), out=tmp_path / "other")


def test_evaluation_and_predictions(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--json"]) == 0
    found, final = json.loads(capsys.readouterr().out), figures(run)[-1]
    assert (found["delta1"], found["absrel"], found["loss"]) == tuple(
        final[f"test_{name}"] for name in ("delta1", "absrel", "loss")
    )
    assert main(["eval", str(run)]) == 0
    assert "delta1" in capsys.readouterr().out
    write(tmp_path / "data", 1)
    picture = str(tmp_path / "data" / "images" / "0.jpg")
    assert main(["predict", str(run), picture, "--draw", str(tmp_path / "out"), "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["predictions"]
    with Image.open(answer["files"][0]) as deep, Image.open(answer["files"][1]) as shown:
        values = np.asarray(deep)
        assert (deep.mode, deep.size, shown.mode) == ("I;16", (32, 32), "L")
    assert values.min() == pytest.approx(answer["nearest"], abs=0.5)
    assert values.max() == pytest.approx(answer["farthest"], abs=0.5)
