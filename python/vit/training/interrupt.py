"""What stops a training from outside: signals to it, and the death of the processes that read its images."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

STOPPED_SECONDS = 10.0  # that a reading process may be stopped (SIGSTOP) while the training is not


class ReaderError(RuntimeError):
    """A process that reads images has died or was stopped; the text says which, and by what."""


class Signals:
    """SIGINT and SIGTERM ask for a checkpoint and the end; a second SIGINT does not wait for it (KeyboardInterrupt).

    As a context manager, in the main thread; elsewhere it does nothing. SIGCHLD is left without a handler meanwhile:
    PyTorch's raises an error wherever the program stands, in the middle of an optimizer step, too. WatchedLoader finds
    a dead reader when its images are missing.
    """

    def __init__(self) -> None:
        self.since = 0.0  # when the first signal came
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return bool(self.since)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        # A launcher passes on what the terminal has already sent: only a later Ctrl-C is a second one.
        if self.since and number == signal.SIGINT and now - self.since > 1.0:
            raise KeyboardInterrupt
        self.since = self.since or now


class WatchedLoader:
    """The batches of a DataLoader, once per iteration. Raises ReaderError when one of the loader's processes dies, or
    is stopped for STOPPED_SECONDS; what a process itself raised comes as it is."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.readers: list[BaseProcess] = []
        self.stopped: set[int] = set()  # readers that were killed for being stopped

    def __iter__(self) -> Iterator[Any]:
        others = set(multiprocessing.active_children())
        with self._named_deaths(), _child_signals_as_before():
            passes = iter(self.loader)
        return self._batches(passes, others)

    def _batches(self, passes: Iterator[Any], others: set[BaseProcess]) -> Iterator[Any]:
        with self._watched(others):
            while True:
                with self._named_deaths(), _child_signals_as_before():
                    batch = next(passes, None)
                    # None are new where the loader keeps its processes from one epoch to the next.
                    self.readers = [p for p in multiprocessing.active_children() if p not in others] or self.readers
                if batch is None:
                    return
                yield batch

    @contextmanager
    def _named_deaths(self) -> Iterator[None]:
        """ReaderError in the place of what a dead reader makes PyTorch raise."""
        try:
            yield
        except Exception as error:
            if (text := self._death(error)) is None:
                raise
            raise ReaderError(text) from error

    @contextmanager
    def _watched(self, others: set[BaseProcess]) -> Iterator[None]:
        """Kills readers that stay stopped, so that they are missed like any dead one, and nobody waits for ever."""
        if not getattr(self.loader, "num_workers", 0):
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(others, done), name="vit-readers", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _watch(self, others: set[BaseProcess], done: threading.Event) -> None:
        since: dict[BaseProcess, float] = {}
        while not done.wait(1.0):
            for reader in [p for p in multiprocessing.active_children() if p not in others] + self.readers:
                if not _is_stopped(reader.pid):
                    since.pop(reader, None)
                elif time.monotonic() - since.setdefault(reader, time.monotonic()) >= STOPPED_SECONDS:
                    self.stopped.add(reader.pid or 0)
                    reader.kill()

    def _death(self, error: Exception) -> str | None:
        """What happened to the readers, if `error` comes from their death."""
        named = type(error).__name__ == "ReaderError"  # the loader's own, which has ended all of its processes
        certain = named or str(error).startswith("DataLoader ")
        if not certain and not isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
            return None
        if self.stopped:
            numbers = ", ".join(map(str, sorted(self.stopped)))
            seconds = f"{STOPPED_SECONDS:.0f} s"
            return f"vit: of the processes that read images (--workers), process {numbers} was stopped for {seconds}"
        if named:
            return str(error)
        deadline = time.monotonic() + 1.0  # the pipe breaks a moment before the process is gone
        while not (dead := [r for r in self.readers if r.exitcode is not None]) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not dead:
            return f"vit: the processes that read images failed: {str(error).splitlines()[0]}" if certain else None
        causes = ", ".join(f"process {reader.pid} {_cause(reader)}" for reader in dead[:4])
        return f"vit: of the processes that read images (--workers), {causes}"


def _cause(reader: BaseProcess) -> str:
    code = reader.exitcode or 0
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = {"SIGKILL": " (often: out of memory)", "SIGBUS": " (often: /dev/shm is full)"}.get(name, "")
    return f"was ended by {name}{hint}"


@contextmanager
def _child_signals_as_before() -> Iterator[None]:
    """Undoes that making a DataLoader's processes sets a handler of SIGCHLD."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if main and before is not None:
            signal.signal(signal.SIGCHLD, before)


def _is_stopped(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False
