"""Pictures are whole: Pillow is kept from filling with grey what a file lacks of its picture.

`PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True`, which many programs and some libraries set, is a switch of the whole
process. It is turned off while a picture is decoded here, and then is what it was.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import ImageFile

_guard = threading.Lock()
_decoding = 0  # how many threads are within `only` since the switch was turned off


@contextmanager
def only() -> Iterator[None]:
    """Files that end within their picture are errors here, and in other threads meanwhile. Nothing is touched where
    the switch is off, as it is by default."""
    global _decoding
    with _guard:
        turned = bool(_decoding or ImageFile.LOAD_TRUNCATED_IMAGES)
        if turned:
            _decoding += 1
            ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        with _guard:
            if turned:
                _decoding -= 1
                ImageFile.LOAD_TRUNCATED_IMAGES = not _decoding


def _after_fork() -> None:
    """A forked reader has one thread, which decodes nothing: what others were about in the parent is not its own."""
    global _guard, _decoding
    if _decoding:
        _decoding, ImageFile.LOAD_TRUNCATED_IMAGES = 0, True
    _guard = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
