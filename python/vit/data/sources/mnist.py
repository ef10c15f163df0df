"""MNIST and its relatives in IDX files; see vit.data.idx."""

from __future__ import annotations

from pathlib import Path

from ..format import Format, path_of
from ..idx import idx, is_idx_folder


def _home(data: str) -> Path | None:
    """The folder of the files: `data`, or the one below it where torchvision puts them (MNIST/raw), if it is one."""
    root = path_of(data)
    if not root.is_dir():
        return None
    if is_idx_folder(root):
        return root
    below = (folder for folder in (root / "raw", *sorted(root.glob("*/raw"))) if folder.is_dir())
    found = [folder for folder in below if is_idx_folder(folder)]
    return found[0] if len(found) == 1 else None


FORMAT = Format(
    about="a folder with MNIST IDX files (train-images-idx3-ubyte[.gz], ...)",
    recognizes=lambda data: _home(data) is not None,
    open=lambda data, request: idx(_home(data) or path_of(data), request.report, request.complete),
    recipe=lambda data: "mnist",
    names=lambda data: list(idx(_home(data) or path_of(data), complete=False).class_names),
    rank=10,
)
