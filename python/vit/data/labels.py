"""Labels that are numbers: which of them are classes, and what these are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .format import Request
from .layout import listed
from .samples import DataError, Samples, Source


def by_names(
    name: str, kind: str, splits: dict[str, Samples], class_names: Sequence[str], where: object, request: Request
) -> Source:
    """The data set whose label i means class_names[i]. DataError names the first image with another label."""
    splits = _labelled(splits, where, request)
    for split, samples in splits.items():
        wrong = np.flatnonzero((samples.labels < 0) | (samples.labels >= len(class_names)))
        if wrong.size:
            first = int(wrong[0])
            raise DataError(
                f"vit: {where}: image {samples.keys[first]} ({split}) has the label {samples.labels[first]}; allowed "
                f"is 0 to {len(class_names) - 1}, the {len(class_names)} classes {listed(class_names)}"
            )
    if len(set(class_names)) < len(class_names):
        twice = next(name for i, name in enumerate(class_names) if name in class_names[:i])
        raise DataError(f"vit: {where}: two classes are called {twice!r}")
    if request.complete:
        _check_training(splits, where)
        present = np.bincount(splits["train"].labels, minlength=len(class_names))
        if empty := [label for label, count in zip(class_names, present, strict=True) if not count]:
            raise DataError(f"vit: {where} has no usable training image of class(es) {listed(empty)}")
    return Source(name, kind, tuple(class_names), splits)


def by_values(name: str, kind: str, splits: dict[str, Samples], where: object, request: Request) -> Source:
    """The data set whose classes are the labels that occur, named by their numbers or texts.

    The caller is told when numbers have gaps, as one wrong label makes them. DataError for fewer than two classes and
    for one that training lacks.
    """
    splits = _labelled(splits, where, request)
    found = {split: np.unique(samples.labels) for split, samples in splits.items()}
    if request.complete:
        _check_training(splits, where)
        values = found["train"]
        for split, others in found.items():
            if (unknown := np.setdiff1d(others, values)).size:
                text = f"{split} images with the label(s) {unknown.tolist()}, which training lacks"
                raise DataError(f"vit: {where} has {text}")
        if len(values) < 2:
            raise DataError(f"vit: every label in {where} is {values[0]}; two classes or more are needed")
    else:
        values = np.unique(np.concatenate(list(found.values())))
    if values.dtype.kind in "iu":
        if values[0] < 0:
            raise DataError(f"vit: {where} has the label {values[0]}; classes are counted from 0")
        if request.complete and len(values) <= values[-1] - values[0]:
            request.say(f"the labels in {where} have gaps: {len(values)} classes, {_ranges(values.tolist())}")
    numbered = {
        split: replace(samples, labels=np.searchsorted(values, samples.labels).astype(np.int64))
        for split, samples in splits.items()
    }
    return Source(name, kind, tuple(str(value) for value in values), numbered)


def _labelled(splits: dict[str, Samples], where: object, request: Request) -> dict[str, Samples]:
    """The splits without those whose every label is -1, as the test images of published sets have it: not known."""
    unknown = [split for split, samples in splits.items() if len(samples) and set(samples.labels.tolist()) == {-1}]
    for split in unknown:
        request.say(f"the {split} images in {where} have no labels (all are -1), and are left out")
    return {split: samples for split, samples in splits.items() if split not in unknown}


def _check_training(splits: dict[str, Samples], where: object) -> None:
    if "train" not in splits or not len(splits["train"]):
        there = " and ".join(splits) or "no"
        raise DataError(f"vit: {where} has {there} images, but no training images to learn from")


def _ranges(values: list[int]) -> str:
    """[0, 1, 2, 7] -> '0-2, 7'."""
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][1] + 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in parts)
