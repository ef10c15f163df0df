"""Signals that ask a training to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any


class Signals:
    """SIGINT and SIGTERM ask for a checkpoint and the end; a second SIGINT does not wait for it (KeyboardInterrupt).

    As a context manager, in the main thread; elsewhere it does nothing. SIGCHLD is left without a handler meanwhile:
    PyTorch's raises an error wherever the program stands, in the middle of an optimizer step, too. vit.data finds
    a dead reader when its images are missing.
    """

    def __init__(self) -> None:
        self.since = 0.0  # when the first signal came
        self.launcher: int | None = None  # the process that started all ranks, where there are several
        self._before: dict[int, Any] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has come, or the launcher has died: it can start no rank again, nor stop one."""
        return bool(self.since) or self.launcher not in (None, os.getppid())

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._received) for number in (signal.SIGINT, signal.SIGTERM)}
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _received(self, number: int, frame: object) -> None:
        now = time.monotonic()
        # A launcher passes on what the terminal has already sent: only a later Ctrl-C is a second one.
        if self.since and number == signal.SIGINT and now - self.since > 1.0:
            raise KeyboardInterrupt
        self.since = self.since or now
