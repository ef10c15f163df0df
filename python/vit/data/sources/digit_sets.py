"""Pictures with one to three of scikit-learn's handwritten digits, for several classes per image: which are there."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ...support.random import Stream
from ..format import Format
from ..samples import Samples, Source
from ..targets import LabelSets
from .digits import digits

COUNTS = {"train": 4000, "test": 600}
SIDE = 16  # two digits


@lru_cache(maxsize=1)
def digit_sets() -> Source:
    """Grey pictures 16 x 16 with a digit in one to three of their quarters. Those of the test are drawn from a fifth of
    the digits, which no training picture has."""
    source = digits()
    given = source.splits["train"]
    images, labels = np.asarray(given.images), given.labels
    cut = len(labels) * 4 // 5
    splits = {}
    for split, numbers in (("train", np.arange(cut)), ("test", np.arange(cut, len(labels)))):
        count = COUNTS[split]
        pictures, there = np.zeros((count, SIDE, SIDE), np.uint8), np.zeros((count, len(source.class_names)), bool)
        for i in range(count):
            rng = Stream("digit_sets", split, i)
            places = rng.permutation(4)[: 1 + int(rng.integers(0, 3, 1)[0])]
            for place, number in zip(places, numbers[rng.integers(0, len(numbers), len(places))], strict=True):
                top, left = 8 * (place // 2), 8 * (place % 2)
                pictures[i, top : top + 8, left : left + 8] = images[number]
                there[i, labels[number]] = True
        keys = [f"{split}-{i}" for i in range(count)]
        splits[split] = Samples(pictures, np.zeros(count, np.int64), keys, LabelSets(there))
    return Source("digit_sets", "digit_sets", source.class_names, splits)


FORMAT = Format(
    about="digit_sets (one to three digits, which are there)",
    recognizes=lambda data: data == "digit_sets",
    open=lambda data, request: digit_sets(),
    recipe=lambda data: "digit_sets",
    rank=1,
    built_in=True,
)
