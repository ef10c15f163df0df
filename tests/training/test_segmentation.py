"""Segmentation: figures, masks that move with their images, folders of masks, and trainings from the command line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import draw
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vit
from PIL import Image
from rounding import about
from training_helpers import Hook, figures, same_bits, summary, terminate
from vit.cli import main
from vit.data import DataError, Samples, open_source
from vit.data.augment import Affine, CropFlip
from vit.data.loader import Images
from vit.data.sources import shapes
from vit.data.targets import Masks
from vit.preprocess import Preprocess
from vit.tasks import get
from vit.tasks.segmentation import predicted_whole
from vit.training import Interrupted, TrainConfig, train
from vit.training.run import Run
from vit.viz.masks import colours

TASK = get("segmentation")
SMALL = TrainConfig(
    data="shapes",
    task="segmentation",
    model="vit_tiny_patch16_224",
    arch={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    epochs=2,
    batch_size=64,
    threads=1,
    warmup_epochs=0.0,
    checkpoint_seconds=1e9,
)


# ---- figures ----


def test_the_figures_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    masks = draw.randint(0, 4, (3, 6, 5))
    masks[0, 0] = 255
    logits = draw.randn(3, 5, 6, 5)
    found, known = summary(TASK, logits, masks), masks != 255
    labels, answers = masks[known], logits.argmax(dim=1)[known]
    wanted = metrics.jaccard_score(labels, answers, labels=range(5), average=None)
    assert found.iou == pytest.approx(wanted.tolist())
    assert found.miou == pytest.approx(wanted.mean())
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, answers))
    assert found.loss == about(F.cross_entropy(logits, masks, ignore_index=255).item())
    assert found.images == 3
    ground = torch.zeros(1, 2, 2, dtype=torch.long)
    nothing = summary(TASK, F.one_hot(ground, 3).permute(0, 3, 1, 2).float(), ground)
    assert nothing.iou[0] == nothing.miou == 1.0
    assert math.isnan(nothing.iou[1])


def test_loss_and_monitor_count_the_pixels_that_have_a_class() -> None:
    masks, logits = draw.randint(0, 3, (2, 8, 8)), draw.randn(2, 3, 4, 4)
    masks[1, :5] = 255
    large = F.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    for smoothing in (0.0, 0.2):
        want = F.cross_entropy(large, masks, ignore_index=255, label_smoothing=smoothing)
        assert TASK.loss(logits, masks, smoothing).item() == about(want.item())
    entropy, right = TASK.monitor(logits, masks).tolist()
    known = masks != 255
    assert entropy == about(F.cross_entropy(large, masks, ignore_index=255).item())
    assert right == pytest.approx((large.argmax(1) == masks)[known].float().mean().item())
    void = torch.full((1, 4, 4), 255)
    assert TASK.loss(logits[:1], void, 0.1).item() == 0.0
    with pytest.raises(ValueError, match="has the loss ce or ce_dice, not bce"):
        TASK.loss(logits, masks, 0.0, "bce")


def test_tokens_become_the_patches_of_the_picture() -> None:
    model = vit.create("vit_tiny_patch16_224", num_classes=3, **SMALL.arch, global_pool="")
    tokens = torch.arange(17 * 3).float().view(1, 17, 3)  # a class token and 4 x 4 patches
    found = TASK.arrange(tokens, model)
    assert found.shape == (1, 3, 4, 4)
    assert found[0, 1, 2, 3].item() == tokens[0, 1 + 2 * 4 + 3, 1].item()


# ---- masks and images move together ----


@pytest.mark.parametrize("augment", [None, Affine(), CropFlip((16, 16))], ids=["none", "affine", "crop"])
@pytest.mark.parametrize("size", [(24, 24), (24, 40)])
def test_masks_move_as_their_images_do(augment, size: tuple[int, int]) -> None:
    """A picture whose brightness is its class: after any movement it still is, but for the blended edges."""
    mask = np.zeros(size, np.uint8)
    mask[5:19, 4:12], mask[8:20, 14:21] = 1, 2
    samples = Samples((100 * mask + 20)[None], np.zeros(1, np.int64), ["0"], Masks(mask[None]))
    images = Images(samples, Preprocess((16, 16), in_chans=1, mean=(0.0,), std=(1.0,)), augment, 3)
    agreed, voids = [], 0
    for epoch in range(20):
        pixels, classes = images[epoch, 0]
        assert classes.shape == (16, 16)
        assert set(classes.unique().tolist()) <= {0, 1, 2, 255}
        seen = ((255 * pixels[0] - 20) / 100).round().clamp(0, 2)
        known = classes != 255
        voids += int((~known).sum())
        agreed.append((seen == classes)[known].float().mean().item())
    assert np.mean(agreed) > 0.86, "edges of the blended picture are between two classes"
    assert (voids > 0) == isinstance(augment, Affine), "what enters at the border is of no class"
    again = images[7, 0][1]
    assert torch.equal(again, images[7, 0][1])


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_view_is_what_the_transform_shows(crop_mode: str) -> None:
    """Of a picture whose brightness is its class, resized to a smaller and to a larger size of another shape."""
    mask = np.zeros((24, 40), np.uint8)
    mask[:12], mask[:, 20:] = 1, mask[:, 20:] + 2
    samples = Samples((60 * mask + 20)[None], np.zeros(1, np.int64), ["0"], Masks(mask[None]))
    for size in ((12, 12), (48, 36)):
        shown = Preprocess(size, in_chans=1, mean=(0.0,), std=(1.0,), crop_mode=crop_mode, interpolation="nearest")
        pixels, classes = Images(samples, shown)[0, 0]
        known = classes != 255
        assert torch.equal(known, pixels[0] > 0), "beyond the border nothing is known"
        wanted = ((255 * pixels[0] - 20) / 60).round().long()
        assert (wanted == classes)[known].float().mean() > 0.97, "a rounding of the size moves an edge by a pixel"
    assert not known.all() or crop_mode != "border"


# ---- data ----


def write(root: Path, count: int = 6, split: str = "", side: int = 40) -> None:
    """Shapes as files, in images/ and masks/."""
    for name in ("images", "masks"):
        (root / split / name).mkdir(parents=True)
    for i in range(count):
        picture, mask = shapes.draw(i)
        picture, mask = (
            Image.fromarray(part).resize((side, side), Image.Resampling.NEAREST) for part in (picture, mask)
        )
        picture.save(root / split / "images" / f"{i}.jpg")
        if i % 2:
            mask.putpalette(colours(256).tobytes())
        mask.save(root / split / "masks" / f"{i}.png")


def test_folders_of_masks_are_read(tmp_path: Path) -> None:
    write(tmp_path / "flat")
    source = open_source(str(tmp_path / "flat"))
    assert (source.kind, source.class_names) == ("mask_folders", ("0", "1", "2", "3"))
    assert source.splits["train"].keys[0] == "images/0.jpg"
    for i in range(6):  # grey and with a palette
        wanted = np.asarray(Image.fromarray(shapes.draw(i)[1]).resize((40, 40), Image.Resampling.NEAREST))
        assert np.array_equal(np.asarray(source.splits["train"].targets.picture(i)), wanted)
    write(tmp_path / "split", 4, "train")
    write(tmp_path / "split", 2, "val")
    (tmp_path / "split" / "classes.txt").write_text("ground\nsquare\ndisc\ntriangle\n")
    source = open_source(str(tmp_path / "split"))
    assert {name: len(part) for name, part in source.splits.items()} == {"train": 4, "val": 2}
    assert source.class_names == shapes.CLASSES


def test_masks_that_cannot_be_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "classes.txt").write_text("ground\nsquare\ndisc\ntriangle\n")
    masks = tmp_path / "masks"
    Image.new("L", (39, 40)).save(masks / "0.png")
    Image.new("L", (40, 40), 4).save(masks / "1.png")
    (masks / "2.png").unlink()
    Image.new("RGB", (40, 40)).save(masks / "3.png")
    (masks / "4.png").write_bytes(b"")
    source = open_source(str(tmp_path))
    assert source.splits["train"].keys == ["images/5.jpg"]
    reasons = {item.path.name: item.reason for item in source.skipped}
    assert reasons["0.jpg"] == "its mask is 39 x 40, the image 40 x 40"
    assert reasons["1.jpg"] == "its mask has the class 4; classes.txt names 0 to 3 (255 is none)"
    assert "there is no mask of its name" in reasons["2.jpg"]
    assert "mode RGB; a mask is grey" in reasons["3.jpg"]
    assert "the file is empty" in reasons["4.jpg"]
    with pytest.raises(DataError, match="5 unusable files"):
        open_source(str(tmp_path), bad_images="refuse")
    (masks / "5.png").unlink()
    with pytest.raises(DataError, match="has no usable image with a mask"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"data": "digits"}, "--task segmentation needs a class for each pixel, and digits has none"),
        ({"task": "classification"}, "shapes has masks, .* give --task segmentation"),
        ({"mixup": 0.5, "patch_drop_rate": 0.1}, "--mixup, --patch-drop-rate: not with --task segmentation"),
        ({"augment": "randaug"}, "--augment randaug: not with --task segmentation"),
        (
            {"task": "hearing"},
            "unknown task 'hearing'; known are classification, depth, multi_label, pose, segmentation",
        ),
    ],
)
def test_what_does_not_go_with_the_task_is_refused(options: dict[str, object], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        train(dataclasses.replace(SMALL, **options), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- trainings ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(SMALL, out=tmp_path_factory.mktemp("segmentation") / "run").run


def test_a_training_goes_on_to_the_bit(run: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(SMALL, out=tmp_path / "part", display=Hook(12, terminate))
    same_bits(run, train(resume=tmp_path / "part").run)
    lines = figures(run)
    assert {"train_cross_entropy", "val_miou", "val_accuracy"} <= lines[0].keys()
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    for name in ("masks.png", "curves.png"):
        assert (run / name).stat().st_size > 5000


def test_evaluation_repeats_the_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    final = figures(run)[-1]
    assert (found["miou"], found["loss"]) == (final["test_miou"], final["test_loss"])
    assert [row["class"] for row in found["per_class"]] == list(shapes.CLASSES)
    assert Run.open(run).evaluate("val").miou == final["val_miou"]
    assert main(["eval", str(run)]) == 0
    assert "mIoU" in capsys.readouterr().out
    assert main(["eval", str(run), "--task", "classification"]) == 1
    assert "was trained for segmentation" in capsys.readouterr().err
    assert main(["eval", str(run), "--crops", "5"]) == 1
    assert main(["eval", str(run / "last.safetensors"), "--data", "shapes", "--task", "segmentation", "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["miou"] < 1
    assert main(["runs", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["test_miou"] == final["test_miou"]


def test_predictions_are_pictures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data", 2, side=50)
    files = [str(path) for path in sorted((tmp_path / "data" / "images").iterdir())]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    words = ["predict", str(run), *files, str(tmp_path / "bad.png"), "--masks", str(tmp_path / "out"), "--json"]
    assert main(words) == 1, "one of them is no picture"
    found = json.loads(capsys.readouterr().out)
    assert [len(found[key]) for key in ("predictions", "failed")] == [2, 1]
    for answer in found["predictions"]:
        assert sum(answer["shares"].values()) == pytest.approx(1)
        with Image.open(answer["files"][0]) as mask, Image.open(answer["files"][1]) as painted:
            assert (mask.mode, mask.size, painted.size) == ("P", (50, 50), (50, 50))
            assert set(np.unique(np.asarray(mask))) <= {0, 1, 2, 3}
    assert main(["predict", str(run), files[0], "--csv", str(tmp_path / "a.csv")]) == 2
    model = vit.create(weights=run).eval()
    picture = Image.fromarray(shapes.draw(3)[0])
    logits = TASK.arrange(model(model.preprocess(picture)[None]), model)
    large = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
    assert torch.equal(predicted_whole(model, picture), large.argmax(1)[0].to(torch.uint8))
