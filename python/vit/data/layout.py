"""How a folder of images is laid out: which sub-folders are splits and which are classes."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ..support.images import EXTENSIONS
from ..support.text import printable
from .samples import DataError

#: What folders of a split are called, in any case of letters.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}

#: Words in the names of folders that are splits elsewhere: seg_train, test2017, TrainSet, dev.
_SPLIT_WORDS = {word: split for split, words in SPLITS.items() for word in words} | {
    "trainset": "train", "valset": "val", "dev": "val", "testset": "test", "eval": "test", "holdout": "test",
}  # fmt: skip

#: Names of the parts of a data set, for cross-validation or from several archives.
_PART = re.compile(r"(k?fold|split|part(ition)?|chunk|shard|set|subset)s?[-_. ]?\d+", re.IGNORECASE)

#: Folders that macOS, Windows, Synology and ext4 put beside the user's own.
_SYSTEM = frozenset(["__MACOSX", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "lost+found"])

ALLOWED = "Allowed: FOLDER/<class>/<image>, or FOLDER/train/<class>/<image> with val/ and test/ beside it"


def split_folders(root: Path) -> dict[str, Path]:
    """Split name -> folder of class folders: `root` itself as "train" unless it has split folders.

    A split folder is called so and has sub-folders; train/ beside bus/ and car/, with images in it, is a class.
    Raises DataError for two folders of one split, images in other folders beside them, splits one level too low, and
    folders that are splits by other names (train_set/, test_set/) or without class folders.
    """
    folders = _folders(root)
    splits = {entry: split for entry in folders if (split := _split_of(entry.name)) and _below(entry)}
    if not splits:
        _refuse_splits_as_classes(root, folders)
        _refuse_parts_as_classes(root, folders)
        for entry in folders:
            _refuse_splits_in(entry)
        return {"train": root}
    found: dict[str, Path] = {}
    for entry, split in splits.items():
        if split in found:
            raise DataError(f"vit: {_shown(root)} has both {found[split].name}/ and {entry.name}/; keep one of them")
        _refuse_splits_in(entry)
        found[split] = entry
    for entry in folders:
        if entry in splits:
            continue
        if _split_of(entry.name):
            raise DataError(f"vit: {_shown(entry)} has no class folders, as {found.popitem()[1].name}/ has. {ALLOWED}")
        if _holds_image(entry):
            names = ", ".join(f"{path.name}/" for path in found.values())
            raise DataError(
                f"vit: {_shown(root)} has {names} and beside it images in {printable(entry.name)}/: it cannot be told "
                f"whether that is a class or a split. Move it away, or rename it to .{printable(entry.name)}. {ALLOWED}"
            )
    return {split: found[split] for split in SPLITS if split in found}


def class_folders(base: Path) -> dict[str, Path]:
    """Class name -> folder, by name. Names are compared as Unicode does (NFC); DataError where two folders are one."""
    found: dict[str, Path] = {}
    real: dict[Path, Path] = {}
    for entry in _folders(base):
        _refuse_splits_in(entry)
        name = unicodedata.normalize("NFC", file_text(entry.name))
        if name in found:
            raise DataError(f"vit: {_shown(base)} has two folders called {printable(name)}, in two Unicode spellings")
        found[name] = entry
        first = real.setdefault(entry.resolve(), entry)
        if first is not entry:
            raise DataError(f"vit: the class folders {_shown(first)} and {_shown(entry)} are one and the same")
    home = base.resolve()
    for resolved, entry in real.items():
        if resolved in (home, *home.parents):
            raise DataError(f"vit: the class folder {_shown(entry)} is a link to a folder that holds it")
    return dict(sorted(found.items()))


def file_text(name: str) -> str:
    """The name of a file as UTF-8 reads it, whatever the locale; bytes that are none stay in it as surrogates."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def listed(names: Sequence[str], near: str | None = None, limit: int = 10) -> str:
    """The names as a list, of many the first ones, those like `near` before them."""
    alike = difflib.get_close_matches(near, names, n=3) if near else []
    hint = f" (nearest: {', '.join(map(printable, alike))})" if alike else ""
    if len(names) <= limit:
        return f"{list(names)!r}{hint}"
    return f"{list(names[:limit])!r} and {len(names) - limit} more{hint}"


def _split_of(name: str) -> str | None:
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def _refuse_splits_as_classes(root: Path, folders: Sequence[Path]) -> None:
    """Two splits by other names, or without class folders, would be told from each other. Classes such as bullet_train
    and test_tube are a small part of theirs, so it takes half of the folders."""
    named = {entry: split for entry in folders if (split := split_word(entry.name))}
    if len(set(named.values())) < 2 or 2 * len(named) < len(folders):
        return
    names = " and ".join(f"{printable(entry.name)}/" for entry in named)
    raise DataError(
        f"vit: {_shown(root)} has {names}, which would be taken for classes. If they are splits, call them train/, "
        f"val/ and test/, with class folders in each; if they are classes, give them other names. {ALLOWED}"
    )


def _refuse_parts_as_classes(root: Path, folders: Sequence[Path]) -> None:
    """fold1/ and fold2/ with the same folders in each are parts of one data set, and those folders its classes."""
    parts = [entry for entry in folders if _PART.fullmatch(entry.name)]
    if len(parts) < 2 or len(parts) < len(folders):
        return
    inside = [{path.name for path in _below(entry)} for entry in parts]
    common = sorted(set.intersection(*inside))
    if len(common) < 2:
        return
    raise DataError(
        f"vit: {_shown(root)} has {printable(parts[0].name)}/ to {printable(parts[-1].name)}/, which would be taken "
        f"for classes, with {listed(common)} in each. If they are parts of one data set, put what is trained on below "
        f"train/ and the rest below val/ or test/; if they are classes, give them other names. {ALLOWED}"
    )


def split_word(name: str) -> str | None:
    """The split that a word in the name means: seg_train, TestImages, val2017."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return next((split for word in words if (split := _SPLIT_WORDS.get(word.lower()))), None)


def _refuse_splits_in(entry: Path) -> None:
    """A folder with train/ and test/ in it is a data set, or a class divided below: one class would mix the two."""
    inside = {split: path.name for path in _below(entry) if (split := _split_of(path.name))}
    if len(inside) > 1:
        names = " and ".join(f"{name}/" for name in inside.values())
        raise DataError(
            f"vit: {_shown(entry)} holds {names}, and would be taken for one class. If it is the data set, give it; if "
            f"it is a class, turn the two levels around. {ALLOWED}"
        )


def _folders(base: Path) -> list[Path]:
    entries = (
        entry for entry in sorted(base.iterdir()) if not entry.name.startswith(".") and entry.name not in _SYSTEM
    )
    return [entry for entry in entries if entry.is_dir()]


def _below(entry: Path) -> list[Path]:
    """The folders in a folder; none in one that may not be read, which is named when its files are listed."""
    try:
        return _folders(entry)
    except PermissionError:
        return []


def _holds_image(base: Path) -> bool:
    return any(Path(name).suffix.lower() in EXTENSIONS for _, _, files in os.walk(base) for name in files)


def _shown(path: Path) -> str:
    return printable(str(path))
