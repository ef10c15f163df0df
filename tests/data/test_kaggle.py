"""Kaggle's Digit Recognizer: train.csv in, submission.csv out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_sources import write_csv
from vit.cli import main
from vit.cli.submission import check, submission

TINY = ["--arch", "embed_dim=16", "depth=1", "num_heads=2", "img_size=8", "patch_size=4"]


def test_from_the_table_to_the_submission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "train.csv", [i % 3 for i in range(60)], side=8)
    images = write_csv(tmp_path / "test.csv", None, side=8)
    run, out = tmp_path / "run", tmp_path / "submission.csv"
    words = ["--recipe", "kaggle_digits", "--data", str(tmp_path / "train.csv"), "--epochs", "1", "--batch-size", "8"]
    assert main(["train", *words, *TINY, "--warmup-epochs", "0", "--out", str(run)]) == 0
    assert main(["predict", str(run), "--data", str(tmp_path / "test.csv"), "--submission", str(out)]) == 0
    rows = out.read_text().splitlines()
    assert rows[0] == "ImageId,Label"
    assert [row.split(",")[0] for row in rows[1:]] == [str(i) for i in range(1, len(images) + 1)]
    assert {row.split(",")[1] for row in rows[1:]} <= {"0", "1", "2"}
    capsys.readouterr()
    assert main(["predict", str(run), "--data", str(tmp_path / "test.csv"), "--json", "--top", "1"]) == 0
    answers = json.loads(capsys.readouterr().out)["predictions"]
    assert [answer["top"][0]["class"] for answer in answers] == [row.split(",")[1] for row in rows[1:]]


def test_what_is_no_submission_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.csv"
    with pytest.raises(ValueError, match="the class 'cat' is no whole number"), submission(str(out), ["cat", "dog"]):
        pass
    with pytest.raises(ValueError, match="would lack image 1: too dark"), submission(str(out), ["0", "1"]) as take:
        take({"error": "too dark"})
    assert not out.exists()
    assert main(["predict", "w", "image.png", "--data", "x.csv"]) == 2
    assert main(["predict", "w"]) == 2
    assert "images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("Id,Label\n1,2\n2,3\n", "line 1: must be ImageId,Label"),
        ("ImageId,Label\n1,2\n", "has 1 answers for 2 images"),
        ("ImageId,Label\n0,2\n1,3\n", "line 2: '0,2'; must be 1,LABEL"),
        ("ImageId,Label\n1,2\n2,10\n", "line 3: '2,10'"),
        ("ImageId,Label\n1,2\n2,3,4\n", "line 3: '2,3,4'"),
    ],
)
def test_the_format_is_checked(tmp_path: Path, text: str, wrong: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ValueError, match=wrong):
        check(tmp_path / "s.csv", 2, [str(i) for i in range(10)])


def test_large_tables_are_read_in_parts(tmp_path: Path) -> None:
    from vit.data.sources.csv_table import read_pixels

    images = write_csv(tmp_path / "t.csv", [i % 10 for i in range(2345)])
    found = read_pixels(tmp_path / "t.csv")
    assert np.array_equal(found.images, images)
    assert found.labels is not None
    assert found.labels.tolist() == [i % 10 for i in range(2345)]
