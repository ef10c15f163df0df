"""The 1,797 handwritten digits that ship inside scikit-learn: 8 x 8 grey images, 10 classes, no download."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ...support.extras import require
from ..format import Format
from ..samples import Samples, Source


@lru_cache(maxsize=1)
def digits() -> Source:
    """The digits as one "train" split; the 17 grey levels are stretched to 0..255."""
    bunch = require("sklearn.datasets", "train").load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    samples = Samples(images, labels, [str(i) for i in range(len(labels))])
    return Source("digits", "digits", tuple(str(name) for name in bunch.target_names), {"train": samples})


FORMAT = Format(
    about="digits",
    recognizes=lambda data: data == "digits",
    open=lambda data, request: digits(),
    recipe=lambda data: "digits",
    rank=0,
    built_in=True,
)
