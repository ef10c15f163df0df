"""Folders for depth: images/ and depths/ with files of the same names, below train/, val/ and test/ or not.

A map of depths is grey, of 8 or 16 bits (or a TIFF of floats), in any unit, of the size of its image; 0 is not known.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..format import Format, Request, path_of
from ..pairs import samples_of, size_of, splits_of, usable_pairs
from ..read import DataError, read_depth
from ..samples import Source
from ..targets import Depths

CLASSES = ("depth",)
_DEPTHS = ("depths", "depth", "depth_maps", "depthmaps")


def depth_folders(root: Path, request: Request) -> Source:
    """The data set in `root`. Images without depths, or with some that cannot be, are left out and named, or refused as
    the request says."""
    found, skipped = usable_pairs(root, splits_of(root, _DEPTHS), request, "map of depths", _examined)
    splits = {split: samples_of(root, pairs, Depths) for split, pairs in found.items()}
    return Source(root.resolve().name, "depth_folders", CLASSES, splits, tuple(skipped))


def _examined(image: Path, depths: Path) -> str:
    """Why a map of depths does not go with its image, or ""."""
    try:
        found, size = read_depth(depths), size_of(image)
    except (DataError, OSError) as error:
        return str(error).removeprefix("vit: ")
    if found.size != size:
        return f"its map of depths is {found.width} x {found.height}, the image {size[0]} x {size[1]}"
    return "" if np.asarray(found).any() else "its map of depths knows no pixel: all are 0"


FORMAT = Format(
    about="images/ and depths/ (16-bit PNG)",
    recognizes=lambda data: bool(splits_of(path_of(data), _DEPTHS)),
    open=lambda data, request: depth_folders(path_of(data), request),
    recipe=lambda data: "depths",
    rank=40,
)
