"""The one door through which pictures come in: a file or a file object -> a decoded, upright PIL image.

Pillow asks every decoder it has whether a file is its own, whatever the file's name, and some of them start programs
(EPS: Ghostscript) or read other files. Here only the seven formats of FORMATS are asked, and a file that ends within
its picture is refused, whatever another part of the program has told Pillow of such files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from . import whole
from .accidents import LOOKED_AT, instead

#: Pillow's names of the formats that are read; each decodes in this process and from this file alone.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

#: What files of these formats are called.
EXTENSIONS = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])

#: Most pixels of one picture, known from its header: 0.7 GB decoded. It is where Pillow's own default refuses.
MAX_PIXELS = 178_956_970

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: Those that change the sides.
_ACROSS = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}

#: Where Pillow looks for the orientation.
_ORIENTED_BY = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")

_KINDS = {
    stat.S_ISDIR: "is a folder",
    stat.S_ISFIFO: "is a pipe, not a file",
    stat.S_ISSOCK: "is a socket, not a file",
    stat.S_ISCHR: "is a device, not a file",
    stat.S_ISBLK: "is a device, not a file",
}


class ImageError(ValueError):
    """A file that is no picture, or none that is read here; the text says why, without the file's name."""


def open_image(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """The decoded first picture of a file, standing upright. Raises OSError, ImageError, and what decoders raise on
    damaged files (`explain` puts all of it into words)."""
    with opened(source) as image:
        image.load()
        return upright(image)


@contextmanager
def opened(source: str | os.PathLike[str] | BinaryIO, deep: bool = False) -> Iterator[Image.Image]:
    """A picture whose header was read and found acceptable; its pixels are not decoded yet. deep: more than 8 bits per
    channel are acceptable."""
    file = _open_file(source) if isinstance(source, (str, os.PathLike)) else source
    try:
        with whole.only():
            image = Image.open(file, formats=FORMATS)
            if decoded_pixels(image) > MAX_PIXELS:
                raise ImageError(_too_large(f"{image.width} x {image.height} pixels, "))
            if is_deep(image) and not deep:
                raise ImageError(f"mode {image.mode}, more than 8 bits per channel; convert the file to 8 bits")
            yield image
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:  # the warning under `python -W error`
        raise ImageError(_above_the_limit(error)) from error
    finally:
        if file is not source:
            file.close()


def decoded_pixels(image: Image.Image) -> int:
    """How many pixels decoding holds at once; the tiles of a TIFF may be larger than its picture."""
    tags: Any = getattr(image, "tag_v2", {})
    tile = [tags.get(tag, 0) for tag in (322, 323)]
    area = tile[0] * tile[1] if all(isinstance(side, int) for side in tile) else 0
    return max(image.width * image.height, area)


def is_deep(image: Image.Image) -> bool:
    """Whether it has more than 8 bits per channel, which a conversion to grey or RGB would clip."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF (or XMP) orientation says it is to be looked at; without one, the image itself.

    The result carries no orientation, so that it is not turned again.
    """
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged description of a sound picture: struct.error, SyntaxError, ...
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in _ORIENTED_BY:
        turned.info.pop(key, None)
    return turned


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the upright image, without decoding it."""
    try:
        turned = _TURNS.get(image.getexif().get(_ORIENTATION, 1), Image.Transpose.ROTATE_180) in _ACROSS
    except Exception:  # as in upright
        turned = False
    return (image.height, image.width) if turned else (image.width, image.height)


def flat(image: Image.Image, mode: str) -> Image.Image:
    """The image in mode "L" or "RGB"; where it is transparent, white shows through."""
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image.convert(mode)
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() != (255, 255):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def explain(path: Path, error: BaseException) -> str:
    """Why a file could not be read as an image, in the user's words."""
    if isinstance(error, FileNotFoundError):
        return "no such file" if not path.is_symlink() else "a link to a file that does not exist"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    try:
        if path.stat().st_size == 0 and path.is_file():
            return "the file is empty"
    except OSError:
        pass
    if type(error).__name__ == "UnidentifiedImageError":
        found = _instead(path)
        return f"not an image, or none of {', '.join(FORMATS)}{f'; {found}' if found else ''}"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _instead(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return instead(file.read(LOOKED_AT))
    except OSError:  # a picture within another file
        return None


def _open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """The file, opened only if it is one: opening a pipe waits for its writer, opening a device may move it."""
    _check_kind(os.stat(path).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_kind(os.fstat(descriptor).st_mode)  # it may have been replaced meanwhile
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_kind(mode: int) -> None:
    for test, text in _KINDS.items():
        if test(mode):
            raise ImageError(text)


def _above_the_limit(error: Exception) -> str:
    """What Pillow's refusal by its own limit says: the program's, where it has set one below ours."""
    limit = Image.MAX_IMAGE_PIXELS or MAX_PIXELS
    most = limit if isinstance(error, Image.DecompressionBombWarning) else 2 * limit
    if most >= MAX_PIXELS:
        return _too_large()
    return (
        f"more than {most:,} pixels, the most that this program lets Pillow decode (PIL.Image.MAX_IMAGE_PIXELS = "
        f"{limit:,}); scale it down or raise that limit"
    )


def _too_large(size: str = "") -> str:
    return f"{size}more than {MAX_PIXELS:,} pixels, the most that is decoded; scale it down"
