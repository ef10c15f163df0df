"""What a kind of data set says of itself: a module of vit.data.sources with FORMAT, found by its file name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .index import Recorder
from .samples import Source


@dataclass(frozen=True)
class Request:
    """How a data set is to be opened; see `vit.data.open_source`."""

    bad_images: str = "skip"
    validate: str = "decode"
    report: Callable[[str], None] | None = None
    classes: Sequence[str] | None = None
    recorder: Recorder | None = None

    @property
    def complete(self) -> bool:
        """Whether there must be training images, of every class: for training, not for images to evaluate."""
        return self.classes is None

    def say(self, text: str) -> None:
        """Tells the caller, who may not listen."""
        if self.report:
            self.report(text)


def _whatever(data: str) -> list[str] | None:
    return None


@dataclass(frozen=True)
class Format:
    """One kind of data set.

    about: in few words, for help and error texts
    recognizes: whether `--data` names such a set, by names of files alone
    open: the data set; DataError names the file, the place and the value that cannot be
    recipe: the kind of data whose recipe fills the open options of a training
    names: class names without a look at the images, or None where `open` finds them as fast
    built_in: whether `--data` is a name, not a path
    rank: of two kinds that recognize the same data the one with the smaller number is it
    """

    about: str
    recognizes: Callable[[str], bool]
    open: Callable[[str, Request], Source]
    recipe: Callable[[str], str]
    names: Callable[[str], list[str] | None] = _whatever
    rank: int = 50
    built_in: bool = False


def path_of(data: str) -> Path:
    """The path that `--data` names."""
    return Path(data).expanduser()


def names_in(data: str) -> list[str]:
    """The names of the files in the folder `data`, sorted; none where it is no folder."""
    path = path_of(data)
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
