"""`vit quantize`: figures side by side, a recommendation with reasons, and a file that holds no float weights."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import vit
from conftest import USABLE
from PIL import Image
from safetensors.torch import save_file
from vit.bench.weights import seeded_state
from vit.cli import main

pytestmark = pytest.mark.skipif("cpu" not in USABLE, reason="the cpu backend is not built")


@pytest.fixture
def weights(tmp_path):
    state = seeded_state(dict(vit.create("vit_digits", backend="reference").named_parameters()))
    path = tmp_path / "digits.safetensors"
    save_file(state, path)
    return path


def quantize(capsys, weights, *options: str) -> tuple[int, dict]:
    words = ("--model", "vit_digits", "--calibrate", "digits", "--images", "16", "--evaluate", "32", "--json")
    code = main(["quantize", str(weights), *words, *options])
    return code, json.loads(capsys.readouterr().out)


def test_figures_file_and_sensitivity(capsys, weights, tmp_path):
    target = tmp_path / "int8.safetensors"
    code, report = quantize(capsys, weights, "--sensitivity", "--max-drop", "1", "--output", str(target))
    assert [f["dtype"] for f in report["figures"]] == ["float32", "bfloat16", "int8"]
    plain, _, quantized = report["figures"]
    assert plain["cosine"] == pytest.approx(1)
    assert 0.98 < quantized["cosine"] < 1
    assert quantized["weight_bytes"] < plain["weight_bytes"]
    cosines = [entry["cosine"] for entry in report["sensitivity"]]
    assert len(cosines) == 4 * 4
    assert cosines == sorted(cosines)
    assert cosines[0] > quantized["cosine"]  # one layer alone costs less than all of them
    # Which is faster on so small a model is the machine's business; the answer, code and file must agree.
    assert code == (0 if report["recommended"] else 1)
    assert target.exists() == report["recommended"]


def test_weights_only_is_for_memory_and_need_not_be_faster(capsys, weights, tmp_path):
    target = tmp_path / "int4.safetensors"
    options = ("--weights-only", "int4", "--max-drop", "1", "--min-cosine", "0.9", "--output", str(target))
    code, report = quantize(capsys, weights, *options)
    assert (code, report["objections"]) == (0, [])
    plain, low, stored = report["figures"]
    assert stored["dtype"] == "int4 weights"
    assert stored["weight_bytes"] < low["weight_bytes"] < plain["weight_bytes"]
    assert vit.Engine.load(target).weights == "int4"


def test_a_limit_that_cannot_be_met_is_refused_and_nothing_is_saved(capsys, weights, tmp_path):
    target = tmp_path / "int8.safetensors"
    code, report = quantize(capsys, weights, "--min-cosine", "1", "--output", str(target))
    assert code == 1
    assert any("below the limit of 1" in reason for reason in report["objections"])
    assert report["file"] is None
    assert not target.exists()


def test_excluded_layers_stay_exact(capsys, weights):
    everything = ",".join(
        f"blocks.{i}.{layer}" for i in range(4) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    )
    _, report = quantize(capsys, weights, "--exclude", everything)
    # Smoothing rounds differently: the cosine of vectors a rounding of bfloat16 apart, 2^-7, is within its square of 1.
    assert report["figures"][2]["cosine"] == pytest.approx(report["figures"][1]["cosine"], abs=2**-14)


def test_a_run_is_compared_on_its_own_test_split_and_calibrated_on_its_training_images(tmp_path):
    from argparse import Namespace

    from vit.cli.quantize import _images
    from vit.training.config import TrainConfig
    from vit.training.run import Run

    model = vit.create("vit_digits", backend="reference")
    about = {"name": "vit_digits", "arch": {}, "class_names": [str(i) for i in range(10)]}
    about["preprocess"] = model.preprocess.to_dict()
    run = Run.create(tmp_path / "run", TrainConfig(split_seed=3, test_fraction=0.3), about)
    args = Namespace(weights=str(run.path), calibrate="digits", images=10_000, evaluate=10_000)
    calibration, images, labels = _images(args, model)
    train, test = run.samples("train", None), run.samples("test", None)
    assert (len(calibration), len(images)) == (len(train), len(test))
    assert sorted(labels.tolist()) == sorted(test.labels.tolist())
    digests = [{image.numpy().tobytes() for image in part} for part in (calibration, images)]
    assert len(digests[0] & digests[1]) < 3  # the data has a few equal images


def test_objections_name_what_is_wrong():
    from vit.engine.quantize import Figures, objections

    plain = Figures("float32", 0.9, 1.0, 100.0, 400)
    good = Figures("int8", 0.895, 0.999, 150.0, 100)
    assert objections(plain, good, 0.01, 0.99) == []
    slow, wrong = dataclasses.replace(good, images_per_second=90.0), dataclasses.replace(good, top1=0.88)
    assert "not faster" in objections(plain, slow, 0.01, 0.99)[0]
    assert "90.00 % to 88.00 %" in objections(plain, wrong, 0.01, 0.99)[0]
    assert "is nan, below" in objections(plain, dataclasses.replace(good, cosine=math.nan), 0.01, 0.99)[0]
    assert objections(plain, good, math.nan, 0.99)


def test_bad_usage_and_data_of_other_classes(capsys, weights, tmp_path):
    assert main(["quantize", str(weights), "--calibrate", "digits", "--images", "0"]) == 2
    options = ("--model", "vit_digits", "--calibrate", "digits")
    assert main(["quantize", str(weights), *options, "--exclude", "blocks.9.mlp"]) == 1
    assert "blocks.9.mlp cannot be excluded" in capsys.readouterr().err
    other = dict(vit.create("vit_digits", backend="reference", num_classes=3).named_parameters())
    save_file({name: torch.zeros_like(x) for name, x in other.items()}, tmp_path / "three.safetensors")
    assert main(["quantize", str(tmp_path / "three.safetensors"), *options]) == 1
    assert "10 classes, the model 3" in capsys.readouterr().err


def test_four_images_of_a_class_are_enough(capsys, weights, tmp_path):
    """A tenth of four images is none: the split that is not compared on may be empty."""
    images = vit.data.open_source("digits").splits["train"]
    for label in range(10):
        folder = tmp_path / "few" / f"{label}"
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(images.images[i] * 15).save(folder / f"{i}.png")
    words = ("--model", "vit_digits", "--calibrate", str(tmp_path / "few"), "--images", "8", "--json")
    main(["quantize", str(weights), *words])
    assert json.loads(capsys.readouterr().out)["images"] == 10
