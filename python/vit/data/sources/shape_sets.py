"""The drawn pictures of `shapes`, each with the set of shapes that can be seen in it: for several classes per image."""

from __future__ import annotations

import numpy as np

from ..format import Format
from ..samples import Samples, Source
from ..targets import LabelSets, Masks
from .shapes import CLASSES, shapes


def shape_sets() -> Source:
    """All pictures as one "train" split; a shape of which others leave fewer than 12 pixels is not there."""
    source = shapes()
    samples = source.splits["train"]
    assert isinstance(samples.targets, Masks)
    masks = np.asarray(samples.targets.items)
    there = np.stack([(masks == kind).sum(axis=(1, 2)) >= 12 for kind in range(1, len(CLASSES))], axis=1)
    own = Samples(samples.images, samples.labels, samples.keys, LabelSets(there))
    return Source("shape_sets", "shape_sets", CLASSES[1:], {"train": own})


FORMAT = Format(
    about="shape_sets (drawn, which shapes are there)",
    recognizes=lambda data: data == "shape_sets",
    open=lambda data, request: shape_sets(),
    recipe=lambda data: "shape_sets",
    rank=1,
    built_in=True,
)
