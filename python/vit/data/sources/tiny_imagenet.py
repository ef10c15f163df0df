"""TinyImageNet as published: wnids.txt, train/<wnid>/images/*.JPEG, val/images with val/val_annotations.txt.

test/ comes without labels and is not read; a test split is drawn from the training images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...support.text import printable
from ..folder import check_of, describe, examined, images_below
from ..format import Format, Request, path_of
from ..labels import by_names
from ..samples import DataError, Samples, Skipped, Source


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"vit: cannot read {path}: {error}") from error


def tiny_imagenet(root: Path, request: Request) -> Source:
    """The data set in `root`; classes are called by their WordNet numbers, as in wnids.txt."""
    wnids = [line.strip() for line in _lines(root / "wnids.txt") if line.strip()]
    known = {wnid: label for label, wnid in enumerate(wnids)}
    skipped: list[Skipped] = []
    found: dict[str, list[tuple[Path, int]]] = {"train": [], "val": []}
    for wnid, label in known.items():
        if (folder := root / "train" / wnid).is_dir():
            paths, others = images_below(folder)
            skipped += [one for one in others if one.path.suffix != ".txt"]  # bounding boxes
            found["train"] += [(path, label) for path in paths]
    annotations = root / "val" / "val_annotations.txt"
    for number, line in enumerate(_lines(annotations), 1):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        if not rest or rest[0] not in known:
            raise DataError(
                f"vit: {annotations}, line {number}: {printable(line[:80])!r} is not an image's name and one of the "
                f"{len(wnids)} numbers of wnids.txt, with tabs between"
            )
        found["val"].append((root / "val" / "images" / name, known[rest[0]]))
    check = check_of(request.validate, root, request.recorder)
    splits = {}
    for split, items in found.items():
        reasons, marks = examined([path for path, _ in items], check, len(items), request.report)
        skipped += [Skipped(path, why) for (path, _), why in zip(items, reasons, strict=True) if why]
        usable = [place for place, why in enumerate(reasons) if not why]
        paths, labels = [items[place][0] for place in usable], [items[place][1] for place in usable]
        keys = [path.relative_to(root).as_posix() for path in paths]
        splits[split] = Samples(paths, np.array(labels, np.int64), keys, marks=marks[usable])
    if skipped and request.bad_images == "refuse":
        raise DataError(f"vit: {describe(skipped, root)}. Remove them, or use --bad-images skip")
    source = by_names(root.resolve().name, "tiny_imagenet", splits, wnids, root, request)
    return Source(source.name, source.kind, source.class_names, source.splits, tuple(skipped))


def _recognizes(data: str) -> bool:
    root = path_of(data)
    return (root / "wnids.txt").is_file() and (root / "val" / "val_annotations.txt").is_file()


FORMAT = Format(
    about="TinyImageNet's folder (wnids.txt, train/, val/val_annotations.txt)",
    recognizes=_recognizes,
    open=lambda data, request: tiny_imagenet(path_of(data), request),
    recipe=lambda data: "tiny_imagenet",
    names=lambda data: [line.strip() for line in _lines(path_of(data) / "wnids.txt") if line.strip()],
    rank=20,
)
