"""Where images come from: each kind of data set is a module of vit.data.sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .format import Format, Request, path_of
from .index import Recorder
from .samples import DataError, ReaderError, Samples, Skipped, Source

__all__ = [
    "DataError",
    "ReaderError",
    "Samples",
    "Skipped",
    "Source",
    "class_names",
    "is_built_in",
    "kind_of",
    "open_source",
    "recipe_of",
]


def allowed() -> str:
    """What `--data` may be, in words."""
    from .sources import formats

    texts = [found.about for found in formats().values()]
    first = ["digits", "a folder of class folders"]  # what most look for
    return ", ".join([*first, *(text for text in texts if text not in first)])


def _format_of(data: str) -> tuple[str, Format]:
    from .sources import formats

    for name, found in formats().items():
        if data and found.recognizes(data):
            return name, found
    what = "is a file" if data and path_of(data).exists() else "does not exist"
    raise DataError(f"vit: data {data!r} {what}; allowed: {allowed()}")


def kind_of(data: str) -> str:
    """The name of the module of vit.data.sources that reads `data`; DataError when none does."""
    return _format_of(data)[0]


def is_built_in(data: str) -> bool:
    """Whether `data` is a name and no path: data that come with a package, or are drawn."""
    return _format_of(data)[1].built_in


def recipe_of(data: str) -> str:
    """The kind of data whose recipe fills the open options of a training on `data`."""
    return _format_of(data)[1].recipe(data)


def class_names(data: str) -> list[str]:
    """The names of the classes in `data`, where possible before its images are looked at."""
    found = _format_of(data)[1]
    names = found.names(data)
    return list(found.open(data, Request(classes=())).class_names) if names is None else names


def open_source(
    data: str,
    bad_images: str = "skip",
    validate: str = "decode",
    report: Callable[[str], None] | None = None,
    classes: Sequence[str] | None = None,
    recorder: Recorder | None = None,
) -> Source:
    """The data set behind `--data`.

    bad_images: "skip" leaves unusable images out, "refuse" raises DataError that names them
    validate: "decode" decodes every image once; "header" reads the headers only, for large and trusted data
    report: called with a line of text while a long check runs
    classes: the names a model knows. The labels are then numbers in this order, the data may hold images of some of
    the classes only, and need no training images.
    recorder: writes down what each file is; see `vit.data.index`
    """
    source = _format_of(data)[1].open(data, Request(bad_images, validate, report, classes, recorder))
    return source if classes is None else source.relabelled(classes, report)
