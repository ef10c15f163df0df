"""What SIGINT, SIGTERM and SIGHUP do to the command `vit`: it ends with one line and exit code 128 + the signal's
number, wherever it stands.

Without an exception: one that is raised anywhere gets lost in a destructor or an `except` of a library, or ends in a
traceback. What has to be tidied, saved or said is named before, by `when_stopped`. A training has handlers of its own
meanwhile (vit.training.interrupt), and programs that import vit keep theirs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: What is done before the command ends, the last first; of the texts they give the first ends the line.
_actions: list[Callable[[], str | None]] = []


def add(action: Callable[[], str | None]) -> None:
    """Has a signal that ends the command call `action`; see `when_stopped`."""
    _actions.append(action)


def remove(action: Callable[[], str | None]) -> None:
    """Takes it back."""
    _actions.remove(action)


@contextmanager
def when_stopped(action: Callable[[], str | None]) -> Iterator[None]:
    """Inside, a signal that ends the command calls `action`, in whatever the main thread is doing: it takes no lock.
    What it returns is said."""
    add(action)
    try:
        yield
    finally:
        remove(action)


@contextmanager
def deferred(*numbers: signal.Signals) -> Iterator[None]:
    """Signals (default: all that end the command) wait until the block is left; processes that are started inside never
    get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers or SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def listen() -> None:
    """Sets the handlers of the command. What is ignored (nohup, a job in the background of a script) stays so."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _end)
        global _owner
        _owner = os.getpid()


_owner = 0


def _end(number: int, frame: object) -> None:
    if os.getpid() != _owner:  # a process that it has started, which its own parent tells what to do
        os._exit(128 + number)
    began = time.monotonic()

    def again(number: int, frame: object) -> None:
        if time.monotonic() - began > 1.0:  # else a launcher passes on what the terminal has already sent
            os._exit(128 + number)

    for other in SIGNALS:
        signal.signal(other, again)
    processes = sys.modules.get("multiprocessing.process")
    for process in processes.active_children() if processes else ():
        process.kill()
    said = []
    for action in reversed(_actions):
        with suppress(Exception):
            said.append(action())
    with suppress(Exception):  # the pipe's reader may be gone, or the program inside a write
        sys.stdout.flush()
    words = [word for word in reversed(said) if word][:1]
    text = "; ".join([f"vit: stopped by {signal.Signals(number).name}", *words])
    cursor = "\x1b[?25h" if "rich" in sys.modules and os.isatty(2) else ""  # which a bar hides
    with suppress(OSError):
        os.write(2, f"{cursor}{text}\n".encode(errors="backslashreplace"))
    os._exit(128 + number)


def _is_command() -> bool:
    """Whether this process is `vit` or `python -m vit`, as far as can be told while its package is imported."""
    processes = sys.modules.get("multiprocessing.process")
    if processes and processes.parent_process():
        return False
    word = (getattr(sys, "argv", None) or [""])[0]
    return Path(word).name == "vit" or (word == "-m" and "vit" in sys.orig_argv)


if _is_command():
    listen()
