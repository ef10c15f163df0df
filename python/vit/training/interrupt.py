"""Signals that ask a training to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from ..support.stop import SIGNALS


class Interrupted(Exception):
    """A signal, or the death of the launcher, stopped the training; `number` is the signal's."""

    def __init__(self, text: str, number: int = signal.SIGTERM) -> None:
        super().__init__(text)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells count it."""
        return 128 + self.number


class Signals:
    """SIGINT, SIGTERM and SIGHUP ask for a checkpoint and the end; after a second one the handler of before decides,
    which does not wait for it (KeyboardInterrupt in a notebook, the end of the command `vit`).

    As a context manager, in the main thread; elsewhere it does nothing, and nothing to signals that are ignored (by
    nohup). SIGCHLD is left without a handler meanwhile: PyTorch's raises an error wherever the program stands, in the
    middle of an optimizer step, too. vit.data finds a dead reader when its images are missing.
    """

    def __init__(self) -> None:
        self.since = 0.0  # when the first signal came
        self.number: int = signal.SIGTERM  # which it was
        self.launcher: int | None = None  # the process that started all ranks, where there are several
        self._before: dict[int, Any] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has come, or the launcher has died: it can start no rank again, nor stop one."""
        return bool(self.since) or self.launcher not in (None, os.getppid())

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._received) for number in heard}
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _received(self, number: int, frame: object) -> None:
        now = time.monotonic()
        # A launcher passes on what the terminal has already sent: only a later signal is a second one.
        if self.since and now - self.since > 1.0:
            if callable(before := self._before.get(number)):
                before(number, frame)
        elif not self.since:
            self.since, self.number = now, number
