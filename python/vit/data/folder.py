"""Image folders: one sub-folder per class, optionally below train/, val/ and test/ (in any case of letters).

Every image is opened and decoded once before training starts. A file that is missing, empty, truncated or no
image is named and counted, then skipped or refused as asked. Hidden files are ignored.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ..support.images import EXTENSIONS, decoded_pixels, explain, opened
from ..support.text import printable
from .equal import mark_of
from .index import Check, Index, Recorder
from .layout import ALLOWED, class_folders, file_text, listed, split_folders
from .samples import DataError, Samples, Skipped, Source

SHOWN = 10  # how many bad files an error text names

#: Larger pictures are decoded one at a time: 16 threads with the largest allowed would take 11 GB.
LARGE = 1 << 24


def folder(
    root: Path,
    bad_images: str = "skip",
    validate: str = "decode",
    report: Callable[[str], None] | None = None,
    classes: Sequence[str] | None = None,
    recorder: Recorder | None = None,
) -> Source:
    """The data set of a folder.

    bad_images: "skip" leaves unusable files out, "refuse" raises DataError that names them
    validate: "decode" decodes every image once; "header" reads the headers only, for large and trusted data
    report: called with a line of text while a long check runs
    classes: the names a model knows; the folder may then hold some of them and needs no train/
    recorder: writes down what each file is, for an index; without one, files that an index knows are not looked at
    Raises DataError for fewer than two classes, a class without images, or a class unknown to the training
    split.
    """
    roots = split_folders(root)
    bases = {split: class_folders(base) for split, base in roots.items()}
    class_names = _class_names(root, roots, bases) if classes is None else tuple(classes)
    _check_known(bases, class_names, str(roots["train"]) if classes is None else "the model")
    check = check_of(validate, root, recorder)
    skipped: list[Skipped] = []
    splits = {}
    for split, found in bases.items():
        labels_of = {name: label for label, name in enumerate(class_names) if name in found}
        items = [(path, label) for name, label in labels_of.items() for path in _files(found[name], skipped)]
        reasons, marks = examined((path for path, _ in items), check, len(items), report)
        skipped += [Skipped(path, why) for (path, _), why in zip(items, reasons, strict=True) if why]
        usable = [place for place, why in enumerate(reasons) if not why]
        paths = [items[place][0] for place in usable]
        labels = np.array([items[place][1] for place in usable], dtype=np.int64)
        keys = [file_text(path.relative_to(root).as_posix()) for path in paths]
        splits[split] = Samples(paths, labels, keys, marks=marks[usable])
    if skipped and bad_images == "refuse":
        raise DataError(f"vit: {describe(skipped, root)}. Remove them, or use --bad-images skip")
    if classes is None:
        _check_filled(splits["train"], class_names, root, skipped)
    return Source(file_text(root.resolve().name), "folder", class_names, splits, tuple(skipped))


def describe(skipped: Iterable[Skipped], root: Path) -> str:
    """'3 unusable files: cats/a.jpg (the file is empty), ...': names the first ten and counts the rest."""
    files = list(skipped)
    names = [printable(f"{os.path.relpath(item.path, root)} ({item.reason})") for item in files[:SHOWN]]
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f"{len(files)} unusable file{'s' * (len(files) != 1)}: {', '.join(names)}{more}"


def images_below(base: Path) -> tuple[list[Path], list[Skipped]]:
    """The image files in a folder and its sub-folders, in order, and what is none by its name or not readable."""
    skipped: list[Skipped] = []
    return _files(base, skipped), skipped


def _class_names(root: Path, roots: dict[str, Path], bases: dict[str, dict[str, Path]]) -> tuple[str, ...]:
    if "train" not in roots:
        there = " and ".join(f"{base.name}/" for base in roots.values())
        raise DataError(f"vit: {root} has {there} but no train/ to learn from. {ALLOWED}")
    names = tuple(bases["train"])
    if len(names) < 2:
        raise DataError(
            f"vit: {roots['train']} has {len(names)} class folder(s) {list(names)}; two or more are needed. {ALLOWED}"
        )
    return names


def _check_known(bases: dict[str, dict[str, Path]], class_names: Sequence[str], owner: str) -> None:
    known = set(class_names)
    for found in bases.values():
        for name, path in found.items():
            if name not in known:
                text = f"{printable(str(path))} is not a class of {owner}; its classes are"
                raise DataError(f"vit: {text} {listed(class_names, near=name)}")


def _check_filled(train: Samples, class_names: Sequence[str], root: Path, skipped: list[Skipped]) -> None:
    counts = np.bincount(train.labels, minlength=len(class_names))
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"vit: no usable training image in class folder(s) {listed(empty)} of {root}"
            + (f"; {describe(skipped, root)}" if skipped else "")
        )


def _files(base: Path, skipped: list[Skipped]) -> list[Path]:
    """The images below a class folder, in order. Links are followed, but no folder is read twice or from within."""
    found = []
    real = base.resolve()
    seen = {folder: folder for folder in (real, *real.parents)}

    def unreadable(error: OSError) -> None:
        skipped.append(Skipped(Path(error.filename), explain(Path(error.filename), error)))

    for parent, folders, files in os.walk(base, onerror=unreadable, followlinks=True):
        names = sorted(name for name in folders if not name.startswith("."))
        folders.clear()
        for name in names:
            path = Path(parent, name)
            if (first := seen.setdefault(path.resolve(), path)) is path:
                folders.append(name)
            else:
                skipped.append(Skipped(path, f"the same folder as {first}"))
        for name in sorted(files):
            if name.startswith("."):
                continue
            path = Path(parent, name)
            if path.suffix.lower() in EXTENSIONS:
                found.append(path)
            else:
                skipped.append(Skipped(path, "not an image by its name"))
    return found


class _Decoder:
    """Decodes pictures in any number of threads, large ones one after the other."""

    def __init__(self) -> None:
        self._turn = threading.Lock()

    def decode(self, path: Path) -> int:
        """The mark of the picture."""
        with opened(path) as image, self._turn if decoded_pixels(image) > LARGE else nullcontext():
            image.load()
            return mark_of(image)


def _read_header(path: Path) -> None:
    with opened(path):
        pass


def check_of(validate: str, root: Path | None = None, recorder: Recorder | None = None) -> Check:
    """What is done with each path or file object before training: "decode", which gives the picture's mark, or
    "header"; nothing with a file that the index of the folder `root` knows."""
    check: Check = {"decode": _Decoder().decode, "header": _read_header}[validate]
    if recorder:
        return recorder.watching(check)
    index = Index.of(root) if root else None
    return index.guarding(check) if index else check


def examined(
    items: Iterable[Any], check: Check, total: int, report: Callable[[str], None] | None
) -> tuple[list[str], np.ndarray]:
    """Per path or number of an image why `check` finds it unusable, or "", and its mark. Decoding releases the
    interpreter lock, so threads help."""

    def look(item: Any) -> tuple[str, int]:
        try:
            return "", check(item) or 0
        except Exception as error:
            return explain(Path(str(item)), error), 0

    reasons, marks = [], np.zeros(total, np.uint64)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for place, (why, mark) in enumerate(pool.map(look, items)):
            reasons.append(why)
            marks[place] = mark
            if report and (place + 1) % 10_000 == 0:
                report(f"checked {place + 1:,} of {total:,} images")
    return reasons, marks
