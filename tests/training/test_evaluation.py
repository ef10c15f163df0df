"""Evaluation: top-5, per class, calibration, several views of an image, neighbours and probes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import draw
import numpy as np
import pytest
import torch
import vit
from PIL import Image
from rounding import about, close
from safetensors.torch import save_file
from training_helpers import summary
from vit.cli import main
from vit.data import open_source
from vit.preprocess import Preprocess
from vit.support.random import Stream
from vit.tasks import get
from vit.tasks.classification import calibration_bins, confusion_counts, per_class
from vit.training import evaluate
from vit.training.corruptions import _OF_PIXELS, CORRUPTIONS, SEVERITIES, Corrupted
from vit.training.features import features, knn_accuracy, probe_accuracy
from vit.training.views import Views, averaged

GREY = Preprocess((8, 8), in_chans=1)
TASK = get("classification")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    draw.restart("evaluation")
    return draw.fill(vit.create("vit_digits", depth=2, embed_dim=32, num_heads=2), 0.3).eval()


# ---- figures ----


def test_top5_and_accuracy_count_images() -> None:
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [9.0, 8, 7, 6, 5, 4, 3], [1.0, 2, 3, 4, 5, 6, 7]])
    result = summary(TASK, logits, torch.tensor([4, 5, 6]))
    assert (result.accuracy, result.top5) == (1 / 3, 2 / 3)
    assert summary(TASK, torch.zeros(7, 7), torch.arange(7)).top5 == 5 / 7, "equal logits are no five guesses"
    assert summary(TASK, torch.tensor([[0.0, 1.0]]), torch.tensor([0])).top5 == 1.0, "of two classes"


def test_the_calibration_error_is_the_papers() -> None:
    confidence = torch.tensor([0.9, 0.9, 0.95, 0.55], dtype=torch.float64)
    right = torch.tensor([True, False, True, True])
    # Bins of 1/15: 0.9 (twice, half of them right), 0.95 and 0.55 alone.
    want = (2 * abs(0.5 - 0.9) + abs(1 - 0.95) + abs(1 - 0.55)) / 4
    bins = calibration_bins(confidence, right)
    assert [images for images, _, _ in bins] == [1, 2, 1]
    assert bins[1] == (2, pytest.approx(0.9), 0.5)
    assert sum(images * abs(share - sure) for images, sure, share in bins) / 4 == pytest.approx(want)
    sure = summary(TASK, torch.tensor([[100.0, 0.0]]).repeat(4, 1), torch.tensor([0, 0, 0, 1]))
    assert sure.ece == pytest.approx(0.25)


def test_per_class_figures_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    labels, predictions = draw.randint(0, 4, (200,)), draw.randint(0, 4, (200,))
    result = summary(TASK, torch.nn.functional.one_hot(predictions, 5).double(), labels)
    rows = per_class(result, list("abcde"))
    want = metrics.precision_recall_fscore_support(labels, predictions, labels=range(4))
    for row, *values in zip(rows, *want, strict=False):
        assert [row["precision"], row["recall"], row["f1"], row["images"]] == pytest.approx(values)
    assert rows[4] == {"class": "e", "images": 0, "recall": None, "precision": None, "f1": None}
    assert confusion_counts(result, 4) == metrics.confusion_matrix(labels, predictions).tolist()


# ---- views ----


def picture(width: int = 40, height: int = 30) -> Image.Image:
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray((across * 5 + down).astype(np.uint8))


@pytest.mark.parametrize(
    ("crops", "flip", "count"),
    [(1, False, 1), (1, True, 2), (5, False, 5), (5, True, 10), (10, False, 10), (144, False, 144)],
)
def test_views_are_as_many_as_said(crops: int, flip: bool, count: int) -> None:
    views = Views(GREY, crops, flip)(picture())
    assert views.shape == (count, 1, 8, 8)
    if count % 2 == 0:
        assert torch.equal(views[: count // 2].flip(-1), views[count // 2 :]), "the second half mirrors the first"
    if crops == 1:
        assert torch.equal(views[0], GREY(picture()))
    assert len({view.numpy().tobytes() for view in views}) > count // 2


def test_five_crops_are_the_corners_and_the_centre() -> None:
    first = Views(GREY, 5)(picture())
    assert first[0].mean() < first[4].mean() < first[3].mean()
    assert not torch.equal(first[0], first[1])


def test_the_average_is_of_logits_or_of_probabilities() -> None:
    logits = draw.randn(3, 4, 5)
    close(averaged(logits, "logits"), logits.double().mean(dim=1))
    shares = averaged(logits, "probabilities").exp()
    close(shares, logits.double().softmax(dim=2).mean(dim=1))
    close(shares.sum(dim=1), torch.ones(3, dtype=torch.float64))


def test_an_evaluation_with_views_is_the_average_of_its_views(model: torch.nn.Module) -> None:
    samples = open_source("digits").splits["train"].take(range(7))
    views = Views(model.preprocess, 10)
    result = evaluate(model, samples, 3, views=views, average="probabilities")
    with torch.no_grad():
        outputs = torch.stack([model(views(samples.image(i))) for i in range(7)])
    want = summary(TASK, averaged(outputs, "probabilities"), torch.from_numpy(samples.labels))
    assert result.loss == about(want.loss)
    assert torch.equal(result.predictions, want.predictions)


# ---- features ----


def test_neighbours_and_probe_find_classes_that_are_apart(model: torch.nn.Module) -> None:
    source = open_source("digits").divided(0.1, 0.2, 0)
    train, test = (source.splits[split].take(range(n)) for split, n in (("train", 300), ("test", 100)))
    found = [features(model, part, 64) for part in (train, test)]
    assert [part.shape for part in found] == [(300, 32), (100, 32)]
    data = (found[0], train.labels, found[1], test.labels)
    assert knn_accuracy(*data, 5) > 0.4, "random features, yet far above the tenth of a guess"
    assert probe_accuracy(*data) > 0.4
    with pytest.raises(ValueError, match="--knn 301 is more than the 300 training images"):
        knn_accuracy(*data, 301)


# ---- the command ----


def test_the_command_says_all_of_it(model: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = open_source("digits").splits["train"].take(range(60))
    for split, part in (("train", range(40)), ("test", range(40, 60))):
        for i in part:
            folder = tmp_path / "data" / split / str(samples.labels[i])
            folder.mkdir(parents=True, exist_ok=True)
            samples.image(i).save(folder / f"{i}.png")
    weights = tmp_path / "w.safetensors"
    whole = vit.create("vit_digits")
    save_file(draw.fill(whole, 0.2).state_dict(), weights)
    words = ["eval", str(weights), "--model", "vit_digits", "--data", str(tmp_path / "data"), "--split", "test"]
    assert main([*words, "--crops", "5", "--flip", "--knn", "3", "--probe", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    wanted = {"accuracy", "top5", "ece", "loss", "images", "interval", "per_class", "confusion"}
    assert figures.keys() >= wanted | {"knn_accuracy", "probe_accuracy"}
    assert figures["images"] == 20
    assert sum(map(sum, figures["confusion"])) == 20
    low, high = figures["interval"]
    assert low <= figures["accuracy"] <= high
    assert math.isfinite(figures["loss"])
    assert main(words) == 0
    assert "top-5" in capsys.readouterr().out
    assert main([*words, "--crops", "7"]) == 2
    assert main([*words, "--arch", "img_size=16", "--json"]) == 0
    larger = json.loads(capsys.readouterr().out)
    assert larger["images"] == 20
    assert larger["loss"] != figures["loss"], "the same images, in four times as many patches"
    assert main(["eval", str(tmp_path / "data"), "--arch", "img_size"]) != 0


# ---- corruptions ----


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_is_stronger_from_one_severity_to_the_next(kind: str) -> None:
    """Farther from the image, or, where a factor passes 1, in another way; the same for the same seed and pixels."""
    across, down = np.meshgrid(np.arange(64), np.arange(64))
    texture = 96 + 60 * np.sin(across / 3) * np.cos(down / 4) + 20 * (across > 32)
    image = Image.fromarray(np.stack([texture, texture * 0.7, 200 - texture * 0.5], axis=2).astype(np.uint8))
    preprocess = Preprocess((64, 64))
    changed = [Corrupted(preprocess, kind, severity) for severity in SEVERITIES]
    away = [np.abs(np.asarray(one.changed(image)).astype(int) - np.asarray(image)).mean() for one in changed]
    assert away[0] > 0.5
    parts = [away[:2], away[2:]] if kind == "saturate" else [away]  # paler, and then more colourful
    assert all(part == sorted(part) for part in parts)
    first, again = changed[2](image), Corrupted(preprocess, kind, 3)(image)
    assert torch.equal(first, again)
    assert first.shape == (3, 64, 64)
    other = Corrupted(preprocess, kind, 3, seed=1)(image)
    assert torch.equal(first, other) != kind.endswith("noise")


def test_brightness_and_saturation_are_those_of_hsv() -> None:
    colors = pytest.importorskip("matplotlib.colors")
    pixels = draw.rand(5, 6, 3).double().numpy()
    hsv = colors.rgb_to_hsv(pixels)
    for kind, place, changed in (
        ("brightness", 2, np.clip(hsv[..., 2] + 0.2, 0, 1)),
        ("saturate", 1, np.clip(hsv[..., 1] * 2, 0, 1)),
    ):
        wanted = hsv.copy()
        wanted[..., place] = changed
        function, amounts = _OF_PIXELS[kind]
        amount = {"brightness": 0.2, "saturate": 2}[kind]
        assert amount in amounts
        assert np.allclose(function(pixels, amount, Stream("x")), colors.hsv_to_rgb(wanted), rtol=0, atol=1e-12)


def test_corruptions_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    for label in range(2):
        (folder / str(label)).mkdir(parents=True)
        for i in range(3):
            picture(40, 30).convert("RGB").rotate(90 * i + 20 * label).save(folder / str(label) / f"{i}.png")
    weights = tmp_path / "w.safetensors"
    model = vit.create("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2, num_classes=2)
    save_file(draw.fill(model, 0.2).state_dict(), weights)
    arch = ["--arch", "img_size=32", "depth=1", "embed_dim=16", "num_heads=2", "num_classes=2"]
    words = ["eval", str(weights), "--model", "vit_tiny_patch16_224", *arch, "--data", str(folder)]
    drawn = tmp_path / "drawn"
    assert main([*words, "--corrupt", "all", "--severity", "1", "5", "--draw", str(drawn), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["kind"], row["severity"]) for row in found["corruptions"]] == [
        (kind, severity) for kind in CORRUPTIONS for severity in (1, 5)
    ]
    assert found["corrupted_accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in found["corruptions"]]))
    assert all(0 <= row["accuracy"] <= 1 and math.isfinite(row["loss"]) for row in found["corruptions"])
    assert sum(bin["images"] for bin in found["calibration"]) == 6
    gaps = [bin["images"] * abs(bin["accuracy"] - bin["confidence"]) for bin in found["calibration"]]
    assert sum(gaps) / 6 == pytest.approx(found["ece"])
    assert {path.name for path in drawn.iterdir()} == {"confusion.png", "calibration.png"}
    assert main([*words, "--corrupt", "fog"]) == 2
    assert "--corrupt has no fog" in capsys.readouterr().err
    assert main([*words, "--corrupt", "jpeg_compression"]) == 0
    assert "jpeg_compression, severity 3:" in capsys.readouterr().out
    grey = vit.create("vit_digits")
    with pytest.raises(ValueError, match="saturate changes nothing of grey images"):
        Corrupted(grey.preprocess, "saturate", 1)
