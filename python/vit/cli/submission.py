"""Answers as Kaggle's Digit Recognizer takes them: ImageId,Label with a line per image, counted from 1."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..support.files import replacing

HEADER = ["ImageId", "Label"]


@contextmanager
def submission(target: str | None, class_names: Sequence[str]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a function that takes the answers in order; the file is there when all are written and read back.

    Raises ValueError where classes are no whole numbers, which the competition's labels are, and for an answer that is
    an error: a submission has a line for every image.
    """
    if not target:
        yield lambda answer: None
        return
    if wrong := [name for name in class_names if not (name.isdecimal() and name.isascii())]:
        raise ValueError(
            f"vit: --submission: the class {wrong[0]!r} is no whole number, as the labels of a submission are"
        )
    written: list[list[str]] = []

    def take(answer: dict[str, Any]) -> None:
        if "error" in answer:
            raise ValueError(f"vit: --submission {target} would lack image {len(written) + 1}: {answer['error']}")
        written.append([str(len(written) + 1), answer["top"][0]["class"]])

    yield take
    with replacing(Path(target)) as path:
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([HEADER, *written])
        check(path, len(written), class_names)


def check(path: Path, images: int, class_names: Sequence[str]) -> None:
    """ValueError, with the line, where a file is no submission for so many images."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0] != HEADER:
        raise ValueError(f"vit: {path}, line 1: must be {','.join(HEADER)}")
    if len(rows) != images + 1:
        raise ValueError(f"vit: {path} has {len(rows) - 1} answers for {images} images")
    known = set(class_names)
    for number, row in enumerate(rows[1:], 1):
        if len(row) != 2 or row[0] != str(number) or row[1] not in known:
            raise ValueError(f"vit: {path}, line {number + 1}: {','.join(row)!r}; must be {number},LABEL")
