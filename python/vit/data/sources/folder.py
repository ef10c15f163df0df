"""Folders of class folders with image files; see vit.data.folder."""

from __future__ import annotations

from ..folder import folder
from ..format import Format, Request, path_of
from ..layout import class_folders, split_folders
from ..samples import Source


def _open(data: str, request: Request) -> Source:
    return folder(
        path_of(data), request.bad_images, request.validate, request.report, request.classes, request.recorder
    )


def _names(data: str) -> list[str]:
    return sorted({name for base in split_folders(path_of(data)).values() for name in class_folders(base)})


FORMAT = Format(
    about="a folder of class folders",
    recognizes=lambda data: path_of(data).is_dir(),
    open=_open,
    recipe=lambda data: "folder",
    names=_names,
    rank=99,  # any folder may be one, so what is nothing else
)
