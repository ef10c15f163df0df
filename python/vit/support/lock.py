"""One owner of a folder at a time, and who it is."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import threading
from contextlib import suppress
from pathlib import Path

from . import stop
from .files import refuse_link

NAME = ".lock"
#: Process, device and inode of the locks that are held here: a POSIX lock does not keep its own process out, and
#: closing any descriptor of the file would give it up.
_held: set[tuple[int, int, int]] = set()
_guard = threading.Lock()


class FolderInUse(ValueError):
    """Another process or thread owns the folder; the text says which."""


class FolderLock:
    """Owns a folder until `close`, or until the process ends in any way. FolderInUse names who has it.

    A POSIX record lock on the file `.lock`: unlike flock it is not inherited by forked readers of images, which outlive
    a killed training by seconds, and it works on NFS.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.descriptor = -1
        while self.descriptor < 0:
            self.descriptor = self._lock()

    def _lock(self) -> int:
        """The locked file; -1 if its last owner has just removed it. The text in it is for people."""
        refuse_link(self.path)
        with _guard:
            if self.path.exists() and _identity(os.stat(self.path)) in _held:
                raise FolderInUse(f"vit: {self.path.parent} is in use by another thread of this process")
            flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o666)
            try:
                key = self._claim(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if key is None:
                os.close(descriptor)
                return -1
            _held.add(key)
        self.key = key
        stop.add(self._remove)
        with suppress(OSError):  # a full disk: what comes next says so, with a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        return descriptor

    def _remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _claim(self, descriptor: int) -> tuple[int, int, int] | None:
        """The identity of the file, locked now; None if the path names another file by now."""
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise FolderInUse(f"vit: {self.path} is no plain file; remove it")
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(os.read(descriptor, 4096).decode("utf-8", "replace"))
            raise FolderInUse(f"vit: {self.path.parent} is in use by {holder}; wait for it or stop it") from None
        try:
            mine = _identity(os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return None
        return mine if mine == _identity(about) else None

    def close(self) -> None:
        """Gives the folder back and removes the file."""
        with _guard:
            if self.descriptor >= 0:
                self._remove()
                stop.remove(self._remove)
                os.close(self.descriptor)
                _held.discard(self.key)
                self.descriptor = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _identity(about: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), about.st_dev, about.st_ino


def _holder(text: str) -> str:
    try:
        about = json.loads(text)
        return f"process {int(about['pid'])} on {str(about['host'])[:100]!r}"
    except (ValueError, KeyError, TypeError):
        return "another process"
