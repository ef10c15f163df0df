"""Files of images, of masks and of depths, and what is said of those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..support.images import ImageError, explain, open_image, opened
from ..support.text import printable


class DataError(ValueError):
    """Data that cannot be used: the text names the file or the value, what is allowed, and the way out."""

    def __init__(self, text: str) -> None:
        # A DataLoader raises a worker's error anew with its traceback as text; the last line of that is the error.
        super().__init__(text.rpartition("DataError: ")[2].strip())


class ReaderError(DataError):
    """A process that reads images died or stopped answering; the text says how."""


def read_image(path: Path) -> Image.Image:
    """The fully decoded, upright image of a file; DataError names the file and what is wrong with it."""
    try:
        return open_image(path)
    except Exception as error:  # decoders raise SyntaxError, struct.error, ... on damaged files, not only OSError
        raise DataError(f"vit: cannot read image {printable(str(path))}: {printable(explain(path, error))}") from error


def read_mask(path: Path) -> Image.Image:
    """The classes in a mask file, mode L: its grey values, or the numbers of its palette. DataError as read_image."""
    try:
        with opened(path) as image:
            image.load()
            if image.mode not in ("L", "P", "1"):
                raise ImageError(f"mode {image.mode}; a mask is grey, or has a palette, with the class as its value")
            values = np.asarray(image)
            return Image.fromarray(values.astype(np.uint8))
    except Exception as error:  # as in read_image
        raise DataError(f"vit: cannot read mask {printable(str(path))}: {printable(explain(path, error))}") from error


def read_depth(path: Path) -> Image.Image:
    """The depths in a file of 8 or 16 bits, or floats (TIFF), mode F. DataError as read_image, and for values below 0
    and those that are no number."""
    try:
        with opened(path, deep=True) as image:
            image.load()
            if image.mode not in ("L", "I", "F") and not image.mode.startswith("I;16"):
                raise ImageError(f"mode {image.mode}; a map of depths is grey, of 8 or 16 bits")
            values = np.asarray(image).astype(np.float32)
            if not (np.isfinite(values) & (values >= 0)).all():
                raise ImageError("it has depths that are below 0 or no number")
            return Image.fromarray(values)
    except Exception as error:  # as in read_image
        raise DataError(f"vit: cannot read depths {printable(str(path))}: {printable(explain(path, error))}") from error
