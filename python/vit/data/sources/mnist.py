"""MNIST and its relatives in IDX files; see vit.data.idx."""

from __future__ import annotations

from ..format import Format, path_of
from ..idx import idx, is_idx_folder

FORMAT = Format(
    about="a folder with MNIST IDX files (train-images-idx3-ubyte[.gz], ...)",
    recognizes=lambda data: path_of(data).is_dir() and is_idx_folder(path_of(data)),
    open=lambda data, request: idx(path_of(data), request.report, request.complete),
    recipe=lambda data: "mnist",
    names=lambda data: list(idx(path_of(data), complete=False).class_names),
    rank=10,
)
