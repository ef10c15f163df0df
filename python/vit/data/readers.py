"""The processes that read images (`--workers`): how they end, and how their death or standstill is found and named."""

from __future__ import annotations

import multiprocessing.process
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..support.stop import deferred
from .samples import ReaderError

STOPPED_SECONDS = 10.0  # that a reader may be stopped (SIGSTOP) while the program that reads is not
PATIENCE = 300.0  # seconds without a batch after which readers count as stuck: far above a slow disk, below a night

_NOTHING = object()
_ADVICE = "Use fewer --workers (0 reads in the main process)"


class WatchedLoader:
    """The batches of a DataLoader, once per iteration.

    Raises ReaderError when one of the loader's processes dies, is stopped for STOPPED_SECONDS, or none gives a batch
    for `patience` seconds; no reader is left then. What a reader itself raised comes as it is.

    PyTorch finds the dead by a handler of SIGCHLD, which raises wherever the program stands, in the middle of an
    optimizer step, too. There is none while batches are read: a dead reader is found when its batch is missing.
    """

    def __init__(self, loader: Iterable[Any], patience: float = PATIENCE) -> None:
        self.loader = loader
        self.patience = patience
        self.readers: list[BaseProcess] = []
        # Also at the end of the program, before multiprocessing waits there for processes that may be stopped.
        weakref.finalize(self, _end, self.readers, os.getpid())

    def __iter__(self) -> Generator[Any, None, None]:
        if not getattr(self.loader, "num_workers", 1):
            yield from self.loader
            return
        with _unhandled_deaths(), _Watch(self.readers, self.patience) as watch:
            try:
                with self._start():
                    passes = watch.wait(lambda: iter(self.loader))
                watch.know(passes, complete=False)  # a wrapper may start them with the first batch
                with self._start():
                    batch = watch.wait(lambda: next(passes, _NOTHING))
                watch.know(passes, complete=True)
                while batch is not _NOTHING:
                    yield batch
                    batch = watch.wait(lambda: next(passes, _NOTHING))
            except ReaderError:
                self.close()
                raise
            finally:
                if not getattr(self.loader, "persistent_workers", False):
                    self.close()

    @contextmanager
    def _start(self) -> Iterator[None]:
        """Readers that begin with `leave_signals` are forked with signals blocked, and so is every thread of theirs.
        PyTorch may start one before it calls that function, and the kernel gives a signal to any thread that takes it.
        """
        if getattr(self.loader, "worker_init_fn", None) is not leave_signals:
            yield
            return
        with deferred():
            yield

    def close(self) -> None:
        """Ends the readers. Another iteration starts new ones."""
        _end(self.readers, os.getpid())
        if getattr(self.loader, "_iterator", None) is not None:
            self.loader._iterator = None  # type: ignore[attr-defined]


class _Watch:
    """The watch over one iteration: it kills readers that stand still, so that they are missed like dead ones."""

    def __init__(self, readers: list[BaseProcess], patience: float) -> None:
        self.readers, self.patience = readers, patience
        self.others = set(multiprocessing.active_children())
        self.started: set[BaseProcess] = set()
        self.waiting_since: float | None = None  # since when the program waits for a batch
        self.stopped: list[int] = []  # readers that were killed for being stopped
        self.stopped_seconds = min(STOPPED_SECONDS, patience)
        self.dead: list[BaseProcess] = []  # readers that were dead when the others were killed
        self.stuck = False  # whether readers were killed for giving no batch
        self.complete = bool(readers)  # whether all readers are known
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look, name="vit-readers", daemon=True)

    def __enter__(self) -> _Watch:
        if self.readers:
            self.thread.start()  # else when they are: no thread should run while processes are forked
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        if self.thread.ident:
            self.thread.join()

    def know(self, passes: Any, complete: bool) -> None:
        """Takes note of the readers of an iterator. Where a wrapper hides them, they are the processes that are new;
        none are where it keeps them from one iteration to the next."""
        self.readers[:] = getattr(passes, "_workers", None) or self._new() or self.readers
        self.complete = complete or bool(self.readers)
        if not self.thread.ident:
            self.thread.start()

    def wait(self, step: Callable[[], Any]) -> Any:
        """What `step` gives; ReaderError in the place of what a dead reader makes PyTorch raise."""
        self.waiting_since = time.monotonic()
        try:
            with _unhandled_deaths():  # PyTorch sets its handler when it starts the first reader
                return step()
        except Exception as error:
            if (text := self._death(error)) is None:
                raise
            raise ReaderError(f"vit: {text}. {_ADVICE}") from error
        finally:
            self.waiting_since = None

    def _new(self) -> list[BaseProcess]:
        """Processes started since; those that have died meanwhile, too, which multiprocessing forgets."""
        self.started |= set(multiprocessing.process._children) - self.others  # type: ignore[attr-defined]
        return sorted(self.started, key=lambda process: process.pid or 0)

    def _present(self) -> list[BaseProcess]:
        return list(self.readers) if self.complete or self.waiting_since is None else self._new()

    def _look(self) -> None:
        since: dict[BaseProcess, float] = {}
        pause = min(1.0, self.stopped_seconds / 4)
        # Until hidden readers are known: PyTorch forgets one that dies with its first batch.
        while not self.done.wait(pause if self.complete else 0.005):
            now = time.monotonic()
            readers = self._present()
            for reader in readers:
                if not _is_stopped(reader.pid):
                    since.pop(reader, None)
                elif now - since.setdefault(reader, now) >= self.stopped_seconds:
                    self.stopped.append(reader.pid or 0)
                    reader.kill()
            waiting = self.waiting_since
            late = waiting is not None and now - waiting >= self.patience
            if late and not (since or self.dead or self.stuck):
                self.dead = [reader for reader in readers if reader.exitcode is not None]
                self.stuck = not self.dead
                for reader in readers:
                    reader.kill()

    def _death(self, error: Exception) -> str | None:
        """What happened to the readers, if `error` comes from their death."""
        certain = isinstance(error, RuntimeError) and str(error).startswith("DataLoader ")
        if not certain and not isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
            return None
        if self.stopped:
            causes = [f"process {pid} was stopped for {self.stopped_seconds:g} s" for pid in sorted(self.stopped)]
            return f"a reader process does not answer: {', '.join(causes)}"
        if self.stuck:
            return f"no reader process gave a batch within {self.patience:g} s"
        deadline = time.monotonic() + 1.0  # the pipe breaks a moment before the process is gone
        readers = self.dead or self._present()
        while not (dead := [r for r in readers if r.exitcode is not None]) and time.monotonic() < deadline:
            time.sleep(0.02)
        if dead:
            causes = [f"process {reader.pid} {_cause(reader)}" for reader in dead[:4]]
            return f"a reader process ended unexpectedly: {', '.join(causes)}"
        return f"the reader processes failed: {str(error).splitlines()[0].rstrip('. ')}" if certain else None


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


def _end(readers: list[BaseProcess], parent: int) -> None:
    """Ends processes that may not answer: one that is stopped takes no SIGTERM, and Python's exit would wait for it."""
    if os.getpid() != parent:  # a fork of it
        return
    with _unhandled_deaths():
        for reader in readers:
            reader.kill()
        for reader in readers:
            reader.join(5.0)  # a process that the kernel holds, for a dead file server, ends later
    readers.clear()


@contextmanager
def _unhandled_deaths() -> Iterator[None]:
    """No handler of SIGCHLD for a while. Only the main thread has handlers."""
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if threading.current_thread() is main:  # a generator may be closed elsewhere
            signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def _is_stopped(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


# ---- in the readers ----


def leave_signals(worker: int) -> None:
    """Ctrl-C, SIGHUP and SIGTERM reach all processes of a terminal or a service; the main one decides, and its readers
    end when it says so. A lone SIGTERM to a reader changes nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _nothing)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # already so where WatchedLoader has started the reader
    threading.Thread(target=_obey_parent, daemon=True).start()


def _nothing(number: int, frame: object) -> None:
    """A handler, because a signal that is ignored is not waited for either."""


def _obey_parent() -> None:
    """Only a signal handler in C or this wait learns who has sent a signal."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
