"""Published data sets by torchvision's downloaders, with its checksums; a folder with the files needs no network."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..support.extras import require
from .samples import DataError

#: Name -> torchvision's class.
CLASSES = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}


@dataclass(frozen=True)
class Downloaded:
    """A data set on the disk. `data` is what vit train --data takes; `fetched`: whether it was asked of the network."""

    name: str
    data: Path
    files: tuple[str, ...]
    fetched: bool


def download(name: str, folder: str | Path, offline: bool = False) -> Downloaded:
    """The data set `name` below `folder`: what is there already is compared with its checksums, what is missing comes
    from the network, unless `offline`.

    Raises DataError for an unknown name, and for files that are missing or not the published ones; MissingExtra without
    torchvision.
    """
    if name not in CLASSES:
        raise DataError(f"vit: there is no download of {name!r}; known are {', '.join(CLASSES)}")
    dataset = _dataset(name, Path(folder))
    missing = [path for path, md5 in _files(dataset) if not _is_there(dataset, path)]
    if missing and not offline:
        # What torchvision prints is about its own progress.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                dataset.download()
            except (RuntimeError, OSError) as error:
                raise DataError(_way_out(name, dataset, f"could not be downloaded ({_last(error)})")) from error
        still = [path for path, _ in _files(dataset) if not _is_there(dataset, path)]
    else:
        still = missing
    if still:
        raise DataError(_way_out(name, dataset, f"lacks {', '.join(path.name for path in still)}"))
    integrity = require("torchvision.datasets.utils", "aug").check_integrity
    for path, md5 in _files(dataset):
        if path.exists() and not integrity(str(path), md5):
            raise DataError(
                f"vit: {path} is not the published file: its MD5 is not {md5}; remove it and download it anew"
            )
    return Downloaded(name, _data(dataset), tuple(path.name for path, _ in _files(dataset)), bool(missing))


def _dataset(name: str, folder: Path) -> Any:
    """torchvision's data set with a root alone: its constructor would read the images, of CIFAR by running pickles."""
    require("torchvision", "aug")
    kind = getattr(require("torchvision.datasets", "aug"), CLASSES[name])
    dataset = kind.__new__(kind)
    dataset.root = str(folder)
    return dataset


def _files(dataset: Any) -> Iterator[tuple[Path, str]]:
    """The published files and their MD5: archives of IDX files, or the batches in CIFAR's archive."""
    if hasattr(dataset, "resources"):
        for name, md5 in dataset.resources:
            yield Path(dataset.raw_folder) / Path(name).name, md5
        return
    for name, md5 in [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]:
        yield _data(dataset) / name, md5


def _data(dataset: Any) -> Path:
    if hasattr(dataset, "resources"):
        return Path(dataset.raw_folder)
    return Path(dataset.root) / str(dataset.base_folder)


def _is_there(dataset: Any, path: Path) -> bool:
    """Whether a file exists; of an archive of IDX files the unpacked one is enough."""
    return path.exists() or (hasattr(dataset, "resources") and path.with_suffix("").exists())


def _way_out(name: str, dataset: Any, what: str) -> str:
    names = ", ".join(path.name for path, _ in _files(dataset))
    return f"vit: {name} {what}; without a network put {names} into {_data(dataset)}"


def _last(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
