"""Labelled images: what every source of data is turned into before anything else happens to it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image


class DataError(ValueError):
    """Data that cannot be used: the text names the file or the value, what is allowed, and the way out."""

    def __init__(self, text: str) -> None:
        # A DataLoader raises a worker's error anew with its traceback as text; the last line of that is the error.
        super().__init__(text.rpartition("DataError: ")[2].strip())


@dataclass(frozen=True)
class Samples:
    """Images and their class indices.

    images: grey levels uint8 [n, H, W] held in memory, or the paths of image files
    labels: int64 [n]
    keys: a stable name per image, by which the splits are drawn (a path below the data folder, or a running
        number)
    """

    images: np.ndarray | Sequence[Path]
    labels: np.ndarray
    keys: Sequence[str]

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.labels) == len(self.keys):
            raise ValueError(f"vit: {len(self.images)} images, {len(self.labels)} labels, {len(self.keys)} keys")

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The image as PIL sees it; DataError names a file that cannot be read."""
        item = self.images[index]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        return read_image(item)

    def take(self, indices: Sequence[int] | np.ndarray) -> Samples:
        """The samples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        if isinstance(self.images, np.ndarray):
            images: np.ndarray | Sequence[Path] = self.images[chosen]
        else:
            images = [self.images[i] for i in chosen]
        return Samples(images, self.labels[chosen], [self.keys[i] for i in chosen])

    @staticmethod
    def concatenate(parts: Sequence[Samples]) -> Samples:
        """All samples of `parts`, which hold images of one kind, one after the other."""
        arrays = [part.images for part in parts if isinstance(part.images, np.ndarray)]
        images = np.concatenate(arrays) if arrays else [image for part in parts for image in part.images]
        keys = [key for part in parts for key in part.keys]
        return Samples(images, np.concatenate([part.labels for part in parts]), keys)


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
        order, and no library version changes it. DataError when a split of `needed` would be empty.
        """
        splits = dict(self.splits)
        train = splits["train"]
        wanted = {"test": test_fraction, "val": val_fraction}
        missing = {name: fraction for name, fraction in wanted.items() if name not in splits}
        parts: dict[str, list[int]] = {name: [] for name in ("train", *missing)}
        for label in range(len(self.class_names)):
            members = np.flatnonzero(train.labels == label).tolist()
            members.sort(key=lambda i: _rank(seed, train.keys[i]))
            start = 0
            for name, fraction in missing.items():
                count = round(fraction * len(members))
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

    def fingerprint(self) -> str:
        """A digest of the class names and of every split's keys and labels: equal only for the same data."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for name, samples in sorted(self.splits.items()):
            digest.update(name.encode())
            for key in samples.keys:
                digest.update(key.encode() + b"\0")
            digest.update(samples.labels.tobytes())
            if isinstance(samples.images, np.ndarray):
                digest.update(samples.images.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Skipped:
    """A file that is not part of the data, and why."""

    path: Path
    reason: str


def _rank(seed: int, key: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()


def read_image(path: Path) -> Image.Image:
    """The fully decoded image of a file; DataError names the file and what is wrong with it."""
    try:
        with Image.open(path) as image:
            check_mode(image)
            image.load()
            return image
    except Exception as error:  # decoders raise SyntaxError, struct.error, ... on damaged files, not only OSError
        raise DataError(f"vit: cannot read image {path}: {explain(path, error)}") from error


def check_mode(image: Image.Image) -> None:
    """ValueError for more than 8 bits per channel: the conversion to grey or RGB would clip the values."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise ValueError(f"mode {image.mode}, more than 8 bits per channel; convert the file to 8 bits")


def explain(path: Path, error: BaseException) -> str:
    """Why a file could not be read as an image, in the user's words."""
    if isinstance(error, FileNotFoundError):
        return "no such file" if not path.is_symlink() else "a link to a file that does not exist"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if path.exists() and path.stat().st_size == 0:
        return "the file is empty"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image, or a format Pillow does not read"
    return str(error) or type(error).__name__
