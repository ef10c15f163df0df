"""Timing: each candidate in a process of its own, all alternating by rounds while the others idle.

OpenMP workers spin for a while after each op; candidates that share a process slow each other by up to 1.5x.
A worker blocks on its pipe between rounds, so whoever is timed has the machine to itself, and a slow minute of the
machine hits every candidate alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import resource
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from ..support.stop import deferred
from .runtimes import Refusal

#: A round lasts about this long, but never less than one call.
ROUND_SECONDS = 0.25

#: A call that takes longer is not warmed up in each round: waking a thread pool takes milliseconds.
SLOW_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What a worker times: `step()` once, and `wait()` until the device has finished (a no-op on CPUs).

    `result(out)` is asked once after the race, with the value of the last step: of a model its logits and phases.
    """

    step: Callable[[], Any]
    wait: Callable[[], Any] = lambda: None
    result: Callable[[Any], Any] = lambda out: None


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a candidate was not timed; `refused`: it cannot run here, otherwise it should have."""

    reason: str
    refused: bool


class Worker:
    """A process that makes candidates and times them.

    A failure in it is a RuntimeError here, with its traceback; a Refusal is raised here again.
    """

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would inherit a dead OpenMP pool
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, threads), daemon=True)
        with deferred(signal.SIGINT, signal.SIGHUP):  # which a terminal sends to all its processes; this one stops them
            self.process.start()
        other.close()

    def send(self, command: str, *args: Any) -> None:
        self.pipe.send((command, *args))

    def receive(self) -> Any:
        try:
            status, answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            raise RuntimeError(f"a benchmark worker died with exit code {self.process.exitcode}") from None
        if status == "refused":
            raise Refusal(answer)
        if status == "failed":
            raise RuntimeError(answer)
        return answer

    def request(self, command: str, *args: Any) -> Any:
        self.send(command, *args)
        return self.receive()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.send("stop")
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
        self.pipe.close()


@dataclasses.dataclass
class Timing:
    """Seconds of every timed call of one candidate."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


def race(
    workers: Sequence[Worker],
    make: Callable[..., Candidate],
    jobs: Sequence[tuple[Any, ...]],
    rounds: int,
    on_turn: Callable[[int, str], None] = lambda index, what: None,
) -> list[Timing | Failure]:
    """Times candidate make(*jobs[i]) in workers[i]: warm-up for each, then `rounds` rounds in turn.

    One that fails leaves the race, which goes on without it. on_turn(i, what) is told before each turn.
    """
    outcomes: list[Timing | Failure] = [Timing([]) for _ in workers]

    def request(i: int, *command: Any) -> Any:
        try:
            return workers[i].request(*command)
        except (Refusal, RuntimeError) as error:
            outcomes[i] = Failure(str(error), isinstance(error, Refusal))

    for i, job in enumerate(jobs):
        on_turn(i, "warm-up")
        request(i, "make", make, job)
    for turn in range(rounds):
        for i in ((turn + i) % len(workers) for i in range(len(workers))):
            outcome = outcomes[i]
            if isinstance(outcome, Timing):
                on_turn(i, f"round {turn + 1} of {rounds}")
                outcome.seconds += request(i, "round") or []
    return outcomes


def _serve(pipe: Connection, threads: int) -> None:
    """The loop of a worker process."""
    import torch

    os.dup2(2, 1)  # what exporters print must not end up among the records
    torch.set_num_threads(threads)
    session = _Session()
    while True:
        try:
            command, *args = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        if command == "stop":
            return
        try:
            pipe.send(("done", getattr(session, command)(*args)))
        except Refusal as refusal:
            pipe.send(("refused", str(refusal)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))


class _Session:
    """The commands a worker understands."""

    def __init__(self) -> None:
        self.candidate: Candidate | None = None
        self.out: Any = None
        self.repeats = 1
        self.best = 0.0
        self.base = 0

    def make(self, make: Callable[..., Candidate], job: tuple[Any, ...]) -> None:
        """Builds a candidate and warms it up until its time no longer falls."""
        self.candidate = self.out = None
        gc.collect()
        self.base = _resident()
        _reset_peak()
        self.candidate = make(*job)
        times = [self.once()]
        while sum(times) < SLOW_SECONDS and len(times) < 50 and (len(times) < 2 or sum(times) < ROUND_SECONDS):
            times.append(self.once())
        self.best = min(times)
        self.repeats = max(1, min(1000, int(ROUND_SECONDS / max(self.best, 1e-6))))

    def once(self) -> float:
        assert self.candidate is not None, "round before make"
        begin = time.perf_counter()
        self.out = self.candidate.step()
        self.candidate.wait()
        return time.perf_counter() - begin

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Anything else that wants a process of its own."""
        return function(*args)

    def result(self) -> Any:
        """What the last step gave."""
        assert self.candidate is not None, "result before make"
        return self.candidate.result(self.out)

    def round(self) -> list[float]:
        """One uncounted call wakes the thread pool and warms the caches, where that could show; then the timed ones."""
        if self.best < SLOW_SECONDS:
            self.once()
        return [self.once() for _ in range(self.repeats)]

    def peak_memory(self) -> int:
        """Bytes that making and running the candidate added at most: of its GPU, else of the process."""
        import torch

        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated()
        return max(0, _peak() - self.base)


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _reset_peak() -> None:
    """Starts a new peak of resident memory; where the kernel does not allow it the peak is that of the process."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _peak() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
