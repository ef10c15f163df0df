"""The end of the program while threads use an engine.

When Python ends, a daemon thread that asks for the GIL is ended where it stands. Inside a function of PyTorch, the
release of a tensor among them, that unwinds C++ frames which let nothing through, and the process aborts ("terminate
called without an active exception"). So that no thread is there for an engine's sake, the program waits for the calls
that run, and threads that begin another one sleep until the process is gone.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

WAIT_SECONDS = 10.0  # for calls that run when the program ends: a call takes less, unless the machine stands still
LEAVE_SECONDS = 0.02  # for a thread whose call has ended to release its result and begin another one, where it sleeps


class _Calls:
    """A context for each call: `with calls: ...`."""

    def __init__(self) -> None:
        self.threads: list[int] = []  # one entry for each call that runs; appending and removing are atomic
        self.elsewhere = False  # whether a thread besides the main one has called
        self.ended = False

    def __enter__(self) -> None:
        me = threading.get_ident()
        self.threads.append(me)
        if me == threading.main_thread().ident:
            return
        self.elsewhere = True
        # After the entry: `end` sets the mark first and looks at the entries then, so that one of the two sees it.
        if self.ended:
            self.threads.remove(me)
            _sleep()

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.threads.remove(threading.get_ident())

    def submit(self, executor: ThreadPoolExecutor, call: Callable[..., T], *arguments: object) -> Future[T]:
        """executor.submit(call, *arguments), or in a program that ends as at the begin of a call: an error in another
        thread would unwind frames that hold tensors."""
        try:
            return executor.submit(call, *arguments)
        except RuntimeError as error:
            if "shutdown" in str(error) and threading.get_ident() != threading.main_thread().ident:
                _sleep()
            raise

    def end(self) -> None:
        """Waits for the calls of other threads. Functions of atexit may still use engines, in the main thread."""
        self.ended = True
        if not self.elsewhere:
            return
        deadline = time.monotonic() + WAIT_SECONDS
        me = threading.get_ident()
        while any(thread != me for thread in self.threads) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(LEAVE_SECONDS)


def _sleep() -> None:
    while True:
        time.sleep(3600)  # without the GIL


calls = _Calls()
atexit.register(calls.end)
os.register_at_fork(after_in_child=lambda: calls.threads.clear())  # whose other threads exist in the parent alone
