"""What the classes of a model are called, in answers and as folders of images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..support.records import read_regular
from ..support.text import printable


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        help="text file with one name a line, or 'numbers' (default: those of the weights; ImageNet's, from timm or "
        "torchvision, for weights without names and as many classes as a published ImageNet model)",
    )


def class_names(model: Any, asked: str | None) -> tuple[str, ...]:
    """The name of each class in answers; a line on standard error says where none are known, or which are taken."""
    from ..data.imagenet import SUBSETS, imagenet

    count = model.num_classes
    numbers = tuple(map(str, range(count)))
    if asked == "numbers":
        return numbers
    if asked is not None:
        return _from_file(Path(asked), count)
    known = imagenet(count) if not model.class_names or _are_synsets(model.class_names) else None
    if model.class_names:
        return known.names if known and known.synsets == tuple(model.class_names) else tuple(model.class_names)
    if known:
        print(
            f"vit: the weights name no classes; {count} of them are taken for ImageNet's (--class-names changes it)",
            file=sys.stderr,
        )
        return known.names
    if count in SUBSETS:
        print("vit: ImageNet's class names need timm (pip install timm); classes are numbers", file=sys.stderr)
    return numbers


def folder_names(model: Any, asked: str | None, found: Sequence[str]) -> tuple[str, ...]:
    """What folders of images call the model's classes: as the weights do, by ImageNet's numbers (n01440764) or 0, 1 ...

    found: the names of the data. As many of them as classes, in none of these spellings, are taken in their order.
    """
    from ..data.imagenet import imagenet

    if asked not in (None, "numbers"):
        return class_names(model, asked)
    count = model.num_classes
    spellings = [] if asked else [tuple(model.class_names)] if model.class_names else []
    if not spellings or _are_synsets(spellings[0]):
        if (known := imagenet(count)) and known.synsets and not asked:
            spellings.append(known.synsets)
        spellings.append(tuple(map(str, range(count))))
    for names in spellings:
        if set(found) <= set(names):
            return names
    if not model.class_names and len(found) == count:
        print(
            f"vit: the weights name no classes; the {count} folders are taken for them in the order of their names",
            file=sys.stderr,
        )
        return tuple(found)
    return spellings[0]


def _are_synsets(names: Sequence[str]) -> bool:
    return all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in names)


def _from_file(path: Path, count: int) -> tuple[str, ...]:
    try:
        names = tuple(read_regular(path).decode("utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"vit: --class-names {printable(str(path))} is no UTF-8 text: {error}") from error
    if len(names) != count:
        raise ValueError(f"vit: --class-names {printable(str(path))} has {len(names)} lines, the model {count} classes")
    return names
