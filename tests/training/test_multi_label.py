"""Several classes per image: figures, tables, and trainings from the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import draw
import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image
from rounding import about
from training_helpers import Hook, same_bits, summary, terminate
from vit.cli import main
from vit.data import DataError, kind_of, open_source
from vit.data.sources.shapes import draw as drawn_shape
from vit.tasks import get
from vit.training import Interrupted, TrainConfig, train

TASK = get("multi_label")
SMALL = TrainConfig(
    data="digit_sets",
    model="vit_tiny_patch16_224",
    arch={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    epochs=2,
    batch_size=64,
    threads=1,
    warmup_epochs=0.0,
    checkpoint_seconds=1e9,
)


def test_the_figures_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    there = (draw.rand(50, 4) < 0.3).float()
    there[:, 3] = 0  # of no image
    logits = (4 * draw.randn(50, 4)).round() / 2  # with equal scores among them
    found = summary(TASK, logits, there)
    wanted = [metrics.average_precision_score(there[:, c], logits[:, c]) for c in range(3)]
    assert found.ap[:3] == pytest.approx(wanted)
    assert np.isnan(found.ap[3])
    assert found.map == about(sum(wanted) / 3)
    assert found.f1 == about(metrics.f1_score(there.numpy(), (logits >= 0).numpy(), average="micro"))
    assert found.accuracy == about(((logits >= 0) == (there > 0.5)).double().mean().item())
    assert found.loss == about(F.binary_cross_entropy_with_logits(logits.double(), there.double()).item())
    assert TASK.loss(logits, there, 0.0).item() == about(found.loss)
    assert TASK.loss(logits, there, 0.2).item() == about(
        F.binary_cross_entropy_with_logits(logits, there * 0.8 + 0.1).item()
    )


# ---- tables ----


def write(folder: Path, text: str, count: int = 6) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(drawn_shape(i)[0]).save(folder / f"{i}.png")
    table = folder / "train.csv"
    table.write_text(text)
    return table


NAMED = "image,labels\n0.png,cat|dog\n1.png,\n2.png,dog\n3.png,bird;cat\n4.png,dog\n5.png,cat\n"
COLUMNS = "image,bird,cat,dog\n0.png,0,1,1\n1,0,0,0\n2.png,0,0,1\n3.png,1,1,0\n4.png,0,0,1\n5.png,0,1,0\n"
TAGS = "image_name,tags\n0,cat dog\n1,\n2,dog\n3,bird cat\n4,dog\n5,cat\n"


@pytest.mark.parametrize("text", [NAMED, COLUMNS, TAGS], ids=["names", "columns", "tags"])
def test_tables_of_sets(tmp_path: Path, text: str) -> None:
    table = write(tmp_path / "data", text)
    assert kind_of(str(table)) == kind_of(str(table.parent)) == "label_sets"
    source = open_source(str(table))
    assert source.class_names == ("bird", "cat", "dog")
    wanted = [[0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert source.splits["train"].targets.there.astype(int).tolist() == wanted
    assert source.splits["train"].image(3).size == (32, 32)
    model_knows = open_source(str(table), classes=["dog", "fish", "cat", "bird"])
    assert model_knows.splits["train"].targets.there[0].tolist() == [True, False, True, False]
    with pytest.raises(DataError, match="is none of the classes"):
        open_source(str(table), classes=["dog", "cat"])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("image,labels\n0.png,cat|dog\n1.png\n", "line 3: expected is image,labels"),
        ("image,cat,dog\n0.png,0,1\n1.png,2,0\n", "line 3: '2' must be 0 or 1"),
        ("image,labels\n../0.png,cat|dog\n", "line 2: '../0.png' is not below the folder"),
        ("image,labels\n7.png,cat|dog\n", "names no usable image"),
    ],
)
def test_tables_that_cannot_be_are_named(tmp_path: Path, text: str, error: str) -> None:
    table = write(tmp_path / "data", text)
    with pytest.raises(DataError, match=error):
        open_source(str(table))


@pytest.mark.parametrize(
    "text",
    [
        "image,label\n0.png,cat\n1.png,dog\n",
        "image,labels\n0.png,cat\n1.png,dog\n",
        "image,label,fold\n0.png,1,0\n1.png,0,1\n",
    ],
)
def test_tables_with_one_class_per_image_stay_what_they_were(tmp_path: Path, text: str) -> None:
    table = write(tmp_path / "data", text)
    assert kind_of(str(table)) == "csv_table"
    assert sorted(open_source(str(table)).splits["train"].labels.tolist()) == [0, 1]


# ---- from the command line ----


def test_from_a_table_to_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{i}.png,{'|'.join(names)}" for i in range(40) if (names := ["a"] * (i % 2) + ["b"] * (i % 3 > 0)) or True]
    table = write(tmp_path / "data", "\n".join(["image,labels", *rows]) + "\n", 40)
    arch = ["--arch", "img_size=32", "patch_size=16", "embed_dim=16", "depth=1", "num_heads=2"]
    words = ["--data", str(table), "--epochs", "1", "--batch-size", "8", "--threads", "1", "--mixup", "0.5", *arch]
    run = tmp_path / "run"
    assert main(["train", "--task", "multi_label", *words, "--out", str(run), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["eval", str(run), "--json", "--draw", str(tmp_path / "drawn")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["map"] == trained["test_map"]
    assert [row["class"] for row in found["per_class"]] == ["a", "b"]
    assert (run / "labels.png").is_file()
    assert (tmp_path / "drawn" / "labels.png").is_file()
    assert main(["predict", str(run), str(table.parent / "0.png"), "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["predictions"]
    assert answer["probabilities"].keys() == {"a", "b"}
    assert set(answer["labels"]) == {name for name, share in answer["probabilities"].items() if share >= 0.5}
    labels = tmp_path / "labels.csv"
    assert main(["data", "index", str(table), "--labels", str(labels), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["per_class"] == {"a": 20, "b": 26}
    assert labels.read_text().startswith("image,labels,split\n0.png,,train\n1.png,a|b,train\n")
    assert main(["train", "--task", "multi_label", *words, "--teacher", str(run), "--out", str(tmp_path / "x")]) == 1
    assert "--teacher: not with --task multi_label" in capsys.readouterr().err
    assert main(["eval", str(run), "--probe"]) == 1
    assert "--probe: with --task classification alone" in capsys.readouterr().err


def test_a_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, mixup=0.3, cutmix=1.0, hflip=0.5)
    whole = train(config, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, out=tmp_path / "run", display=Hook(5, terminate))
    same_bits(whole.run, train(resume=tmp_path / "run").run)
