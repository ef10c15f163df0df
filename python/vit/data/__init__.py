"""Where images come from: scikit-learn's digits, folders of class folders, MNIST IDX files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .samples import DataError, ReaderError, Samples, Skipped, Source

__all__ = ["DataError", "ReaderError", "Samples", "Skipped", "Source", "kind_of", "open_source"]

ALLOWED = "digits, a folder of class folders, or a folder with MNIST IDX files (train-images-idx3-ubyte[.gz], ...)"


def kind_of(data: str) -> str:
    """ "digits", "mnist" or "folder"; DataError when `data` is none of them."""
    from .idx import is_idx_folder

    if data == "digits":
        return "digits"
    path = Path(data).expanduser()
    if not data or not path.exists():
        raise DataError(f"vit: data {data!r} does not exist; allowed: {ALLOWED}")
    if not path.is_dir():
        raise DataError(f"vit: data {data!r} is a file; allowed: {ALLOWED}")
    return "mnist" if is_idx_folder(path) else "folder"


def open_source(
    data: str,
    bad_images: str = "skip",
    validate: str = "decode",
    report: Callable[[str], None] | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """The data set behind `--data`; see vit.data.folder for `bad_images`, `validate` and `report`.

    classes: the names a model knows. The labels are then numbers in this order, the data may hold images of some of
    the classes only, and need no training images.
    """
    kind = kind_of(data)
    path = Path(data).expanduser()
    if kind == "folder":
        from .folder import folder

        source = folder(path, bad_images, validate, report, classes)
    elif kind == "mnist":
        from .idx import idx

        source = idx(path, report, complete=classes is None)
    else:
        from .digits import digits

        source = digits()
    return source if classes is None else source.relabelled(classes, report)
