"""Labelled images: what every source of data is turned into before anything else happens to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..support.images import explain
from ..support.text import printable
from .read import DataError as DataError
from .read import ReaderError as ReaderError
from .read import read_image as read_image
from .stored import Stored
from .targets import Targets


@dataclass(frozen=True)
class Samples:
    """Images and their class indices.

    images: uint8 [n, H, W] (grey) or [n, H, W, 3] held in memory, the paths of image files, or what a store decodes
    labels: int64 [n]
    keys: a stable name per image, by which the splits are drawn (a path below the data folder, or a running
        number); parts of one picture have its name
    targets: what the images are to be answered with, where that is more than a class (vit.data.targets). The labels are
        then zeros
    marks: uint64 [n], equal where pictures are, 0 where they were not decoded (vit.data.equal)
    """

    images: np.ndarray | Stored | Sequence[Path]
    labels: np.ndarray
    keys: Sequence[str]
    targets: Targets | None = None
    marks: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.labels) == len(self.keys):
            raise ValueError(f"vit: {len(self.images)} images, {len(self.labels)} labels, {len(self.keys)} keys")
        if self.targets is not None and len(self.targets) != len(self.labels):
            raise ValueError(f"vit: {len(self.images)} images, {len(self.targets)} {self.targets.kind}")

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The image as PIL sees it; DataError names a file that cannot be read."""
        if isinstance(self.images, Stored):
            return _decoded(self.images, index)
        item = self.images[index]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        return read_image(item)

    def take(self, indices: Sequence[int] | np.ndarray) -> Samples:
        """The samples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        images: np.ndarray | Stored | Sequence[Path]
        if isinstance(self.images, np.ndarray):
            images = self.images[chosen]
        elif isinstance(self.images, Stored):
            images = self.images.take(chosen)
        else:
            images = [self.images[i] for i in chosen]
        targets = None if self.targets is None else self.targets.take(chosen)
        marks = None if self.marks is None else self.marks[chosen]
        return Samples(images, self.labels[chosen], [self.keys[i] for i in chosen], targets, marks)

    @staticmethod
    def concatenate(parts: Sequence[Samples]) -> Samples:
        """All samples of `parts`, which hold images of one kind, one after the other."""
        images: np.ndarray | Stored | Sequence[Path]
        if arrays := [part.images for part in parts if isinstance(part.images, np.ndarray)]:
            images = np.concatenate(arrays)
        elif stored := [part.images for part in parts if isinstance(part.images, Stored)]:
            images = Stored.joined(stored)
        else:
            images = [image for part in parts for image in part.images]  # type: ignore[misc]
        keys = [key for part in parts for key in part.keys]
        found = [part.targets for part in parts if part.targets is not None]
        targets = found[0].joined(found[1:]) if found else None
        known = [part.marks for part in parts if part.marks is not None]
        marks = np.concatenate(known) if len(known) == len(parts) else None
        return Samples(images, np.concatenate([part.labels for part in parts]), keys, targets, marks)


@dataclass(frozen=True)
class Source:
    """A data set: class names, the splits it brings along ("train", perhaps "val" and "test"), and what was
    left out."""

    name: str
    kind: str
    class_names: tuple[str, ...]
    splits: dict[str, Samples]
    skipped: tuple[Skipped, ...] = field(default=())

    def divided(
        self,
        val_fraction: float,
        test_fraction: float,
        seed: int,
        needed: Collection[str] = ("train", "val", "test"),
    ) -> Source:
        """The source with all three splits; those it lacks are drawn from "train", class by class.

        Membership depends on the seed and on an image's own key alone, so more images never move the others'
        order, and no library version changes it. Of classes so small that a fraction is nothing of any of them, one
        image goes there if another is left. DataError when a split of `needed` would be empty.
        """
        splits = dict(self.splits)
        if "train" not in splits:
            raise DataError(f"vit: {self.name} has no training images to draw from, only {' and '.join(splits)}")
        train = splits["train"]
        wanted = {"test": test_fraction, "val": val_fraction}
        missing = {name: fraction for name, fraction in wanted.items() if name not in splits}
        parts: dict[str, list[int]] = {name: [] for name in ("train", *missing)}
        counts = np.bincount(train.labels, minlength=len(self.class_names)).tolist()
        tiny = {name for name, fraction in missing.items() if not any(round(fraction * count) for count in counts)}
        for label in range(len(self.class_names)):
            members = np.flatnonzero(train.labels == label).tolist()
            members.sort(key=lambda i: _rank(seed, train.keys[i]))
            start = 0
            for name, fraction in missing.items():
                count = round(fraction * len(members))
                if name in tiny and fraction:
                    count = int(len(members) - start > 1)
                while 0 < count < len(members) - start and _same(train.keys, members, start + count):
                    count += 1  # several samples of one picture are of one split
                parts[name] += members[start : start + count]
                start += count
            parts["train"] += members[start:]
        for name, indices in parts.items():
            splits[name] = train.take(sorted(indices))
        for name in needed:
            if not len(splits[name]):
                sizes = ", ".join(f"{key} {len(value)}" for key, value in self.splits.items())
                raise DataError(
                    f"vit: the {name} split of {self.name} is empty ({sizes} images; val-fraction "
                    f"{val_fraction}, "
                    f"test-fraction {test_fraction}). Give more images or a larger fraction"
                )
        return replace(self, splits=splits)

    def select(self, split: str, val_fraction: float, test_fraction: float, seed: int) -> Samples:
        """One split, drawn as `divided` does where the source lacks it, or "all" images. DataError when it is empty."""
        if split == "all":
            chosen = Samples.concatenate(list(self.splits.values()))
        elif split == "train" or split not in self.splits:
            chosen = self.divided(val_fraction, test_fraction, seed, needed=()).splits[split]
        else:
            chosen = self.splits[split]
        if not len(chosen):
            raise DataError(f"vit: the {split} split of {self.name} holds no usable image")
        return chosen

    def relabelled(self, classes: Sequence[str], report: Callable[[str], None] | None = None) -> Source:
        """The source with its labels counted in `classes`, by name; `report` is told when some of them do not occur.

        Raises DataError for a class that is not among them.
        """
        places = {name: place for place, name in enumerate(classes)}
        if unknown := [name for name in self.class_names if name not in places]:
            raise DataError(f"vit: {self.name} has the classes {unknown}, the model has {list(classes)}")
        order = np.array([places[name] for name in self.class_names], dtype=np.int64)
        splits = {name: replace(part, labels=order[part.labels]) for name, part in self.splits.items()}
        present = {label for part in splits.values() for label in np.unique(part.labels).tolist()}
        if report and self.answers == "labels" and 0 < len(present) < len(classes):
            names = [printable(classes[label]) for label in sorted(present)[:10]]
            more = f" and {len(present) - 10} more" if len(present) > 10 else ""
            report(f"{self.name} holds {len(present)} of the model's {len(classes)} classes: {', '.join(names)}{more}")
        return replace(self, class_names=tuple(classes), splits=splits)

    @property
    def answers(self) -> str:
        """What the images are to be answered with: "labels", or the kind of their targets."""
        return next((part.targets.kind for part in self.splits.values() if part.targets is not None), "labels")

    def fingerprint(self) -> str:
        """A digest of the class names and of every split's keys and labels: equal only for the same data."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for name, samples in sorted(self.splits.items()):
            digest.update(name.encode())
            for key in samples.keys:
                digest.update(_bytes(key) + b"\0")
            digest.update(samples.labels.tobytes())
            if isinstance(samples.images, np.ndarray):
                digest.update(samples.images.tobytes())
            elif isinstance(samples.images, Stored):
                digest.update(samples.images.digest())
            if samples.targets is not None:
                digest.update(samples.targets.digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Skipped:
    """A file that is not part of the data, and why."""

    path: Path
    reason: str


def _same(keys: Sequence[str], members: Sequence[int], place: int) -> bool:
    """Whether the members at a place and before it are of the same picture."""
    return keys[members[place]] == keys[members[place - 1]]


def _rank(seed: int, key: str) -> bytes:
    return hashlib.blake2b(_bytes(f"{seed}:{key}"), digest_size=16).digest()


def _bytes(text: str) -> bytes:
    """UTF-8, and of a file name that is none the bytes it has on the disk."""
    return text.encode("utf-8", "surrogateescape")


def _decoded(images: Stored, index: int) -> Image.Image:
    try:
        return images[index]
    except Exception as error:  # as in read_image
        name = images.name(index)
        raise DataError(f"vit: cannot read {printable(name)}: {printable(explain(Path(name), error))}") from error
