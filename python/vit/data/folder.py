"""Image folders: one sub-folder per class, optionally below train/, val/ and test/.

Every image is opened and decoded once before training starts. A file that is missing, empty, truncated or no
image is named and counted, then skipped or refused as asked. Hidden files are ignored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from .samples import DataError, Samples, Skipped, Source, check_mode, explain, read_image

EXTENSIONS = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
SHOWN = 10  # how many bad files an error text names


def folder(
    root: Path,
    bad_images: str = "skip",
    validate: str = "decode",
    report: Callable[[str], None] | None = None,
) -> Source:
    """The data set of a folder.

    bad_images: "skip" leaves unusable files out, "refuse" raises DataError that names them
    validate: "decode" decodes every image once; "header" reads the headers only, for large and trusted data
    report: called with a line of text while a long check runs
    Raises DataError for fewer than two classes, a class without images, or a class unknown to the training
    split.
    """
    roots = split_folders(root)
    class_names = tuple(sorted(entry.name for entry in _folders(roots["train"])))
    if len(class_names) < 2:
        raise DataError(
            f"vit: {roots['train']} has {len(class_names)} class folder(s) {list(class_names)}; two or more "
            "are needed. "
            "Allowed: FOLDER/<class>/<image>, or FOLDER/train/<class>/<image> with val/ and test/ beside it"
        )
    check = {"decode": read_image, "header": _read_header}[validate]
    skipped: list[Skipped] = []
    splits = {}
    for split, base in roots.items():
        for entry in _folders(base):
            if entry.name not in class_names:
                raise DataError(f"vit: {entry} is not a class of {roots['train']}; its classes are {list(class_names)}")
        listed = [(path, label) for label, name in enumerate(class_names) for path in _files(base / name, skipped)]
        reasons = _check((path for path, _ in listed), check, len(listed), report)
        skipped += [Skipped(path, why) for (path, _), why in zip(listed, reasons, strict=True) if why]
        usable = [item for item, why in zip(listed, reasons, strict=True) if not why]
        paths = [path for path, _ in usable]
        labels = np.array([label for _, label in usable], dtype=np.int64)
        splits[split] = Samples(paths, labels, [path.relative_to(root).as_posix() for path in paths])
    if skipped and bad_images == "refuse":
        raise DataError(f"vit: {describe(skipped, root)}. Remove them, or use --bad-images skip")
    counts = np.bincount(splits["train"].labels, minlength=len(class_names))
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"vit: no usable training image in class folder(s) {empty} of {roots['train']}"
            + (f"; {describe(skipped, root)}" if skipped else "")
        )
    return Source(root.resolve().name, "folder", class_names, splits, tuple(skipped))


def describe(skipped: Iterable[Skipped], root: Path) -> str:
    """'3 unusable files: cats/a.jpg (the file is empty), ...': names the first ten and counts the rest."""
    files = list(skipped)
    names = [f"{os.path.relpath(item.path, root)} ({item.reason})" for item in files[:SHOWN]]
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f"{len(files)} unusable file{'s' * (len(files) != 1)}: {', '.join(names)}{more}"


def split_folders(root: Path) -> dict[str, Path]:
    """Split name -> folder of class folders: `root` itself as "train" unless it has a train/ folder."""
    if not (root / "train").is_dir():
        return {"train": root}
    found = {}
    for split, names in SPLITS.items():
        there = [root / name for name in names if (root / name).is_dir()]
        if len(there) > 1:
            raise DataError(f"vit: {root} has both {there[0].name}/ and {there[1].name}/; keep one of them")
        if there:
            found[split] = there[0]
    return found


def _folders(base: Path) -> list[Path]:
    return [entry for entry in sorted(base.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]


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


def _read_header(path: Path) -> None:
    with Image.open(path) as image:
        check_mode(image)


def _check(
    paths: Iterable[Path], check: Callable[[Path], object], total: int, report: Callable[[str], None] | None
) -> list[str]:
    """Per path why it is unusable, or ""; decoding releases the interpreter lock, so threads help."""

    def reason(path: Path) -> str:
        try:
            check(path)
        except Exception as error:
            return explain(path, error.__cause__ or error)
        return ""

    reasons = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for done, why in enumerate(pool.map(reason, paths), 1):
            reasons.append(why)
            if report and done % 10_000 == 0:
                report(f"checked {done:,} of {total:,} images")
    return reasons
