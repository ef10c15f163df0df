"""Pose estimation: figures, points that move with their images, COCO's files, and trainings from the command line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vit
from PIL import Image
from rounding import about, close
from training_helpers import Hook, figures, same_bits, summary, terminate
from vit.cli import main
from vit.data import DataError, Samples, open_source
from vit.data.augment import Affine, CropFlip
from vit.data.loader import EpochBatches, Images, loader
from vit.data.points import key_points, mirrored
from vit.data.sources import stick_figures
from vit.preprocess import Preprocess
from vit.tasks import get
from vit.tasks.pose import SIGMA, gaussians, peaks, predicted
from vit.training import Interrupted, TrainConfig, train
from vit.training.run import Run

TASK = get("pose")
SMALL = TrainConfig(
    data="stick_figures",
    task="pose",
    model="vit_tiny_patch16_224",
    arch={"img_size": 48, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "decoder": [16]},
    epochs=2,
    batch_size=128,
    threads=1,
    warmup_epochs=0.0,
    label_smoothing=0.0,
    augment="crop",
    checkpoint_seconds=1e9,
)


# ---- figures ----


def rows(*points: tuple[float, float, float], spread: float = 0.05, side: float = 0.5) -> torch.Tensor:
    """Points (x, y, seen) of one image as shares."""
    return torch.tensor([[(*point, spread, side) for point in points]])


def test_peaks_lie_between_the_cells() -> None:
    """A Gaussian's logarithm is a parabola, so that its middle is found exactly; at a border it is the cell's."""
    targets = rows((0.31, 0.62, 2), (0.508, 0.49, 1), (0.0, 1.0, 2)).double()
    logs = gaussians(targets, (1, 3, 20, 16)).log() + 7.0
    points, shares = peaks(logs)
    wanted = targets[..., :2] * torch.tensor([16.0, 20.0])
    close(points[:, :2], wanted[:, :2])
    assert points[0, 2].tolist() == [0.5, 19.5]
    assert gaussians(targets, (1, 3, 20, 16)).sum(dim=(2, 3)) == pytest.approx(1.0)
    around = 1.0  # the product of what three of the cells hold along each axis
    for count, place in zip((16, 20), wanted[0, 0].tolist(), strict=True):
        cells = [math.exp(-0.5 * ((cell + 0.5 - place) / SIGMA) ** 2) for cell in range(count)]
        around *= sum(cells[int(place) - 1 : int(place) + 2]) / sum(cells)
    close(shares[0, 0], torch.tensor(around, dtype=torch.float64))


def test_the_similarity_is_cocos() -> None:
    """As cocoeval.py: the mean of exp(-d^2 / (2 sigma)^2 / 2 area), over the labelled points."""
    names = ("nose", "left_wrist", "tail")
    truth = np.array([[[10.0, 12.0, 2], [30.0, 20.0, 1], [5.0, 5.0, 0]]])
    answers = np.array([[12.0, 12.0], [30.0, 25.0]])
    area, size = 400.0, 48
    targets = key_points(truth, np.array([area]), np.array([[20.0, 30.0]]), names)
    images = np.zeros((1, size, size, 3), np.uint8)
    samples = Samples(images, np.zeros(1, np.int64), ["0"], targets)
    label = Images(samples, Preprocess((96, 96)))[0, 0][1]  # at twice the size
    away = torch.tensor([[*np.linalg.norm(answers - truth[0, :2, :2], axis=1) * 2, 0.0]])
    from vit.tasks.pose import oks

    sigmas = np.array([0.026, 0.062])
    squares = ((answers - truth[0, :2, :2]) ** 2).sum(axis=1)
    wanted = np.exp(-squares / (2 * sigmas) ** 2 / (area + np.spacing(1)) / 2).mean()
    assert oks(away, label[None], 96).item() == about(wanted)
    assert label[2, 2] == 0
    assert label[0, 3].item() == pytest.approx(2 * 0.026 * 20 / size)
    assert label[0, 4].item() == pytest.approx(30 / size)


def test_loss_and_figures_count_labelled_points() -> None:
    targets = rows((0.3, 0.6, 2), (0.5, 0.5, 0), (0.7, 0.2, 1))
    maps = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8).sin() * 3
    shares, logs = gaussians(targets, maps.shape).flatten(2), maps.flatten(2).log_softmax(dim=2)
    each = -(shares * logs).sum(dim=2)[0]
    assert TASK.loss(maps, targets, 0.0).item() == about(((each[0] + each[2]) / 2).item())
    found = summary(TASK, maps, targets)
    assert found.loss == about(((each[0] + each[2]) / 2).item())
    assert math.isnan(found.found[1])
    monitored = TASK.monitor(maps, targets)
    assert monitored.tolist() == about([found.loss, torch.tensor(found.oks).item()])  # which float32 has as 0
    right = gaussians(targets, (1, 3, 64, 64)).clamp(min=1e-30).log()
    assert summary(TASK, right, targets).pck == 1.0
    assert summary(TASK, right, targets).oks > 0.999
    nothing = summary(TASK, maps, rows((0.1, 0.1, 0), (0.2, 0.2, 0), (0.3, 0.3, 0)))
    assert (nothing.loss, nothing.oks, nothing.pck) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="has the loss ce, not bce"):
        TASK.loss(maps, targets, 0.0, "bce")


# ---- points and images move together ----


def test_left_and_right_change_places_in_a_mirror() -> None:
    assert mirrored(("nose", "left_eye", "right_eye", "left_tail")).tolist() == [0, 2, 1, 3]
    assert mirrored(("a", "b", "c"), [(0, 2)]).tolist() == [2, 1, 0]
    for pairs, text in (([(0, 0)], "must name two"), ([(0, 3)], "must name two"), ([(0, 1), (1, 2)], "twice")):
        with pytest.raises(DataError, match=text):
            mirrored(("a", "b", "c"), pairs)


@pytest.mark.parametrize("augment", [None, Affine(), Affine(rotate=90), CropFlip((32, 32), 0.5)])
@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
@pytest.mark.parametrize("size", [(40, 40), (40, 60)])
def test_points_move_as_their_images_do(augment: Any, crop_mode: str, size: tuple[int, int]) -> None:
    """Bright squares around the points: after any movement each point is where its square is."""
    places = [(12.0, 9.0), (30.0, 25.0), (16.0, 31.0)]
    picture = np.zeros(size, np.uint8)
    for level, (x, y) in zip((80, 160, 240), places, strict=True):
        picture[int(y) - 3 : int(y) + 3, int(x) - 3 : int(x) + 3] = level
    truth = np.array([[(x, y, 2.0) for x, y in places]])
    targets = key_points(truth, np.array([900.0]), np.array([[30.0, 30.0]]), ("left_a", "right_a", "b"))
    samples = Samples(picture[None], np.zeros(1, np.int64), ["0"], targets)
    images = Images(samples, Preprocess((32, 32), in_chans=1, mean=(0.0,), std=(1.0,), crop_mode=crop_mode), augment, 5)
    seen = mirrors = 0
    for epoch in range(12):
        pixels, label = images[epoch, 0]
        shown = 255 * pixels[0]
        levels = [shown[min(31, int(32 * y)), min(31, int(32 * x))].item() if v else None for x, y, v, _, _ in label]
        if (levels[0] or 0) > 120 or 0 < (levels[1] or 0) < 120:  # left and right have changed places
            mirrors += 1
            levels[:2] = levels[1::-1]
        for level, wanted in zip(levels, (80, 160, 240), strict=True):
            if level is not None:
                seen += 1
                assert level == pytest.approx(wanted, abs=25)  # blended with the ground, and far from the next, 80 away
    assert seen > 18
    assert (mirrors > 0) == isinstance(augment, CropFlip)
    assert torch.equal(images[3, 0][1], images[3, 0][1])


def test_workers_give_the_same_points() -> None:
    samples = stick_figures.stick_figures().splits["train"].take(range(12))
    images = Images(samples, Preprocess((48, 48)), CropFlip((48, 48)), 1)
    alone, shared = ([label for _, label in loader(images, EpochBatches(12, 4, 0), workers)] for workers in (0, 2))
    assert all(map(torch.equal, alone, shared))


# ---- data ----


def coco(root: Path, count: int = 6, name: str = "annotations/person_keypoints_train2017.json") -> dict[str, Any]:
    """Two figures beside each other in each picture, with their boxes."""
    (root / "images").mkdir(parents=True)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "person", "keypoints": list(stick_figures.NAMES)}, {"id": 2, "name": "car"}],
    }
    for i in range(count):
        both = [stick_figures.draw(2 * i + side) for side in (0, 1)]
        Image.fromarray(np.concatenate([one[0] for one in both], axis=1)).save(root / "images" / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": 96, "height": 48})
        for side, (_, points, (width, height)) in enumerate(both):
            moved = points + np.array([48, 0, 0]) * side
            left, top = (moved[:, :2].min(axis=0) - 3).tolist()
            content["annotations"].append(
                {
                    "id": 2 * i + side, "image_id": i, "category_id": 1, "keypoints": moved.ravel().tolist(),
                    "bbox": [left, top, width, height], "area": 0.5 * width * height, "num_keypoints": 13,
                }
            )  # fmt: skip
    write(root, content, name)
    return content


def write(root: Path, content: dict[str, Any], name: str = "annotations/person_keypoints_train2017.json") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(content))


def test_cocos_files_are_read(tmp_path: Path) -> None:
    coco(tmp_path)
    source = open_source(str(tmp_path))
    assert (source.kind, source.class_names, source.skipped) == ("coco_points", stick_figures.NAMES, ())
    train = source.splits["train"]
    assert len(train) == 12
    assert train.keys[:2] == ["images/0.png"] * 2
    for i in range(4):  # the part of the picture holds the figure where the points say
        part, points = train.image(i), train.targets.points[i]
        whole, wanted, _ = stick_figures.draw(i)
        left, top = part.info["origin"]
        np.testing.assert_allclose(points[:, :2] + (left, top), wanted[:, :2] + (48 * (i % 2), 0))
        x, y = (int(value) for value in points[0, :2])
        assert part.getpixel((x, y)) == tuple(whole[int(wanted[0, 1]), int(wanted[0, 0])])
    divided = source.divided(0.2, 0.3, 0)
    parts = {name: set(samples.keys) for name, samples in divided.splits.items()}
    assert sum(map(len, parts.values())) == 6, "both figures of a picture are of one split"
    assert sum(map(len, divided.splits.values())) == 12
    alone = open_source(str(tmp_path / "annotations" / "person_keypoints_train2017.json"))
    assert alone.fingerprint() == source.fingerprint()
    names = [*stick_figures.NAMES[::-1], "tail"]  # of a model that has them in another order, and one more
    again = open_source(str(tmp_path), classes=names).splits["train"].targets.points
    np.testing.assert_array_equal(again[:, :13], train.targets.points[:, ::-1])
    assert not again[:, 13].any()
    with pytest.raises(DataError, match=r"has the key points .*nose.*, the model has"):
        open_source(str(tmp_path), classes=names[:5])


def test_splits_by_the_names_of_the_files(tmp_path: Path) -> None:
    content = coco(tmp_path)
    val = content | {"annotations": content["annotations"][:2]}
    write(tmp_path, val, "annotations/person_keypoints_val2017.json")
    assert {name: len(part) for name, part in open_source(str(tmp_path)).splits.items()} == {"train": 12, "val": 2}
    write(tmp_path, val, "annotations/person_keypoints_val2014.json")
    with pytest.raises(DataError, match="two files of key points for val"):
        open_source(str(tmp_path))


def test_annotations_that_cannot_be_are_named(tmp_path: Path) -> None:
    content = coco(tmp_path)
    broken = content["annotations"]
    broken[0]["keypoints"] = broken[0]["keypoints"][:-1]
    broken[1]["keypoints"][3] = 97.0
    broken[2]["keypoints"][4] = math.nan
    broken[3]["category_id"] = 7
    broken[4]["image_id"] = 99
    broken[5]["keypoints"][2] = 3
    broken[6]["bbox"] = [1, 1, 0, 4]
    broken[7]["keypoints"] = [0] * 39  # nobody labelled it
    broken[8]["category_id"] = 2  # a car
    (tmp_path / "images" / "5.png").unlink()
    content["images"].append({"id": 6, "file_name": "../6.png"})
    write(tmp_path, content)
    source = open_source(str(tmp_path))
    assert len(source.splits["train"]) == 1
    reasons = sorted(item.reason for item in source.skipped)
    for text in (
        "annotation 0: 38 numbers of key points; 13 points have 39",
        "annotation 1: left_shoulder at (97, ",
        "annotation 2: keypoints has nan, which is no number",
        "annotation 3: category 7 is unknown",
        "annotation 4: image 99 is unknown",
        "annotation 5: nose has the visibility 3; 0, 1 and 2 are allowed",
        "annotation 6: bbox is [1.0, 1.0, 0.0, 4.0]",
        "no such file",
        "image 6: file_name '../6.png' is no file in the folder",
    ):
        assert [reason for reason in reasons if reason.startswith(text)], text
    assert len(reasons) == 9
    with pytest.raises(DataError, match="9 unusable files"):
        open_source(str(tmp_path), bad_images="refuse")
    for change, text in (
        ({"annotations": {}}, "annotations must be a list"),
        ({"categories": []}, "0 categories with key points"),
        ({"categories": [{"id": "x", "keypoints": ["a"]}]}, "id is 'x'; it must be a whole number"),
        ({"categories": [{"id": 1, "keypoints": ["a", "a"]}]}, "must be different names"),
        ({"categories": [{"id": 1, "keypoints": ["a", "b"], "flip_pairs": [[0]]}]}, "must be a list of pairs"),
    ):
        write(tmp_path, content | change)
        with pytest.raises(DataError, match=text):
            open_source(str(tmp_path))
    (tmp_path / "annotations" / "person_keypoints_train2017.json").write_text("{")
    with pytest.raises(DataError, match="cannot read key points"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"data": "shapes"}, "shapes has masks, which --task pose does not take; give --task segmentation"),
        ({"data": "digits"}, "--task pose needs key points, and digits has none; give a folder with images/ and key"),
        ({"task": "segmentation"}, "stick_figures has key points, .* give --task pose"),
        ({"mixup": 0.5}, "--mixup: not with --task pose"),
        ({"loss": "ce_dice"}, "--task pose has the loss ce, not ce_dice"),
    ],
)
def test_what_does_not_go_with_the_task_is_refused(options: dict[str, object], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        train(dataclasses.replace(SMALL, **options), out=tmp_path / "run")


# ---- trainings ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(SMALL, out=tmp_path_factory.mktemp("pose") / "run").run


def test_a_training_goes_on_to_the_bit(run: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(SMALL, out=tmp_path / "part", display=Hook(11, terminate))
    same_bits(run, train(resume=tmp_path / "part", changes={"workers": 1}).run)
    lines = figures(run)
    assert {"train_cross_entropy", "train_oks", "val_oks", "val_pck"} <= lines[0].keys()
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    for name in ("poses.png", "curves.png"):
        assert (run / name).stat().st_size > 5000


def test_evaluation_repeats_the_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--json"]) == 0
    found, final = json.loads(capsys.readouterr().out), figures(run)[-1]
    assert (found["oks"], found["pck"], found["loss"]) == (final["test_oks"], final["test_pck"], final["test_loss"])
    assert [row["class"] for row in found["per_class"]] == list(stick_figures.NAMES)
    assert Run.open(run).evaluate("val").oks == final["val_oks"]
    assert main(["eval", str(run)]) == 0
    assert "OKS" in (text := capsys.readouterr().out)
    assert "left_wrist: " in text
    assert main(["runs", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["test_oks"] == final["test_oks"]


def test_predictions_are_places_in_the_picture(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = Image.fromarray(stick_figures.draw(3)[0])
    wide = Image.new("RGB", (300, 150))  # the figure at three times its size, in the middle
    wide.paste(picture.resize((144, 144)), (78, 3))
    wide.save(tmp_path / "wide.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    words = [
        "predict",
        str(run),
        str(tmp_path / "wide.png"),
        str(tmp_path / "bad.png"),
        "--draw",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--json"]) == 1, "one of them is no picture"
    found = json.loads(capsys.readouterr().out)
    (answer,) = found["predictions"]
    assert [point["point"] for point in answer["points"]] == list(stick_figures.NAMES)
    assert all(0 <= point["x"] <= 300 and 0 <= point["confidence"] <= 1 for point in answer["points"])
    with Image.open(answer["files"][0]) as drawn:
        assert drawn.size == (600, 300)
    coco(tmp_path / "data", 2)
    assert main(["predict", str(run), "--data", str(tmp_path / "data"), "--json"]) == 0
    boxes = [one["box"] for one in json.loads(capsys.readouterr().out)["predictions"]]
    assert len(boxes) == 4
    assert boxes[1][0] > 40, "a person has a box of its own, and points in the whole picture"
    assert main(["predict", str(run), str(tmp_path / "wide.png"), "--csv", str(tmp_path / "a.csv")]) == 2


def test_places_do_not_depend_on_the_size_of_the_picture(run: Path) -> None:
    model = vit.create(weights=run).eval()
    picture = Image.fromarray(stick_figures.draw(5)[0])
    points, shares = predicted(model, picture)
    large, _ = predicted(model, picture.resize((480, 480), Image.Resampling.NEAREST))
    apart = np.abs(np.array(large) / 10 - points).max(axis=1)  # resized once more, by the transform
    assert (apart < 1.5).sum() >= 10, "of 13; a heat map of two peaks as high as each other may change sides"
    assert len(shares) == 13
