"""The process that reads inputs, and the parent's side of it.

The parent sends one JSON line per input and gets one back. Time and death are the parent's business; memory, exceptions
and started programs are looked at in the process itself, which goes on to the next input.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20
MOST_MEMORY = 512 * MIB  # above what the process had, beside what the file itself justifies
MOST_SECONDS = 10.0  # of the processor
START_SECONDS = 120.0  # likewise, for imports and what is filled once: matplotlib's list of fonts, a first training
ASLEEP = 30.0  # seconds without any work
PROGRAMS = ("gs", "gswin32c", "djpeg", "cjpeg", "convert", "magick", "display", "xdg-open", "dot", "unzip", "tar")

#: In this order in the table; the first two are good.
OUTCOMES = ("right", "named error", "traceback", "wrong silently", "blow-up", "hang", "died", "ran a program")


# ---- in the process ----


class Watch:
    """What no input may make this process do: start a program, connect, write outside its folder."""

    EVENTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "pty.spawn")

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log, self.seen, self.on = str(folder.resolve()), log, "", False
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self.EVENTS:
            self.seen = f"{event} {arguments!r}"[:500]
        elif event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            writes = any(c in (mode or "") for c in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not os.path.abspath(path).startswith((self.folder, "/dev/null", "/proc/self/", "/dev/shm")):
                self.seen = f"wrote {path}"

    def start(self) -> None:
        self.seen, self.on = "", True

    def stop(self) -> str:
        self.on = False
        log = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return log or self.seen


def memory(name: str) -> int:
    """VmRSS, VmHWM (its largest value since it was reset) or VmSize of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    return 0


def attempt(job: dict[str, Any], watch: Watch) -> tuple[str, str]:
    """The outcome of one input, and a text about it."""
    from . import uses

    path = Path(job["path"])
    size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.glob("*")) if f.is_file())
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    watch.start()
    try:
        outcome, text = "right", getattr(uses, job["use"])(path)
    except MemoryError as error:
        outcome, text = "blow-up", repr(error)
    except uses.Wrong as error:
        outcome, text = "wrong silently", str(error)
    except uses.Named as error:
        outcome, text = "named error", str(error)
    except uses.Traceback as error:
        outcome, text = "traceback", str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome, text = classified(error, path)
    ran = watch.stop()
    extra = memory("VmHWM") - before
    if ran:
        return "ran a program", ran
    if extra > job.get("memory", MOST_MEMORY) + 16 * size:
        return "blow-up", f"{extra // MIB} MiB; {outcome}: {text}"
    if outcome == "named error" and job["names"] and path.name not in text:
        return "traceback", f"an error that does not name {path.name}: {text}"
    if outcome == "right":
        if job.get("same") and text != job["digest"]:
            return "wrong silently", "other results than the undamaged file's"
        if job.get("differs") and text == job["digest"]:
            return "wrong silently", f"the change of {'.'.join(job['differs'])} changed nothing"
    return outcome, text


def _warm_up(job: dict[str, Any]) -> None:
    from . import uses

    seed, copy = Path(job["seed"]), Path("warm") / Path(job["seed"]).name
    shutil.rmtree("warm", ignore_errors=True)
    copy.parent.mkdir()
    (shutil.copytree if seed.is_dir() else shutil.copy)(seed, copy)
    with contextlib.suppress(Exception):
        getattr(uses, job["use"])(copy)


def classified(error: BaseException, path: Path) -> tuple[str, str]:
    """An exception of vit for users, or one that escaped it."""
    import traceback

    from vit.cli import _expected
    from vit.training import Interrupted, TrainError

    text = str(error)
    known = isinstance(error, (*_expected(), Interrupted, TrainError))
    if known and text.startswith("vit") and not any(ord(c) < 32 and c not in "\n\t" for c in text):
        return "named error", text
    frames = traceback.format_exception(type(error), error, error.__traceback__)
    return "traceback", "".join(frames)[-1500:]


def main() -> None:
    """Reads jobs until the parent closes the pipe. The working folder is this process's own."""
    replies = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    import logging
    import resource
    import warnings

    import torch
    import vit.cli
    import vit.training  # noqa: F401 (its imports are no input's memory)

    torch.set_num_threads(1)
    logging.getLogger("vit").addHandler(logging.NullHandler())
    logging.getLogger("vit").propagate = False
    warnings.simplefilter("ignore")
    limit = memory("VmSize") + (6 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch(Path.cwd().parent, Path("programs.log"))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    warm: set[str] = set()
    for line in sys.stdin:
        job = json.loads(line)
        if job["use"] not in warm:  # what is imported and filled once is not this input's memory
            warm.add(job["use"])
            _warm_up(job)
            print(json.dumps({"ready": True}), file=replies, flush=True)
        outcome, text = attempt(job, watch)
        print(json.dumps({"outcome": outcome, "text": text[:4000]}), file=replies, flush=True)


# ---- in the parent ----


class Worker:
    """One such process; a new one takes its place when it dies or hangs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        programs = folder / "programs"
        programs.mkdir(exist_ok=True)
        for name in PROGRAMS:
            (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{folder / "programs.log"}"\necho 9.50\n')
            (programs / name).chmod(0o755)
        home = str(folder)
        self.environment = os.environ | {
            **{"PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}", "OMP_NUM_THREADS": "1"},
            "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path))),
            **dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME"), home),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.warm: set[str] = set()  # uses that the process has read a sound file of

    def run(self, job: dict[str, Any]) -> tuple[str, str]:
        """The outcome of one job, and a text about it."""
        if self.process is None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        answer: dict[str, Any] | str = {}
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        if job["use"] not in self.warm:
            self.warm.add(job["use"])
            answer = self._answer(START_SECONDS)
        if not isinstance(answer, str):
            answer = self._answer(MOST_SECONDS)
        if isinstance(answer, dict):
            return answer["outcome"], answer["text"]
        self.close()
        return ("hang", "no answer") if answer == "hang" else ("died", answer)

    def _start(self) -> None:
        self.warm = set()
        command = [sys.executable, "-m", f"{__package__}.worker"]
        with open(self.folder / "stderr", "wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0,  # select sees all
                env=self.environment, cwd=self.folder, start_new_session=True,
            )  # fmt: skip
        if not isinstance(answer := self._answer(START_SECONDS), dict):
            self.close()
            raise RuntimeError(f"the worker does not start ({answer}): {(self.folder / 'stderr').read_text()[-2000:]}")

    def _answer(self, most: float) -> dict[str, Any] | str:
        """The next line; "hang", or how the process died."""
        assert self.process is not None
        assert self.process.stdout is not None
        start, worked, since = self._seconds(), 0.0, time.monotonic()
        while True:
            if select.select([self.process.stdout], [], [], 0.5)[0]:
                line = self.process.stdout.readline()
                if line:
                    return dict(json.loads(line))
                code = self.process.wait()
                name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                return f"{name}: {(self.folder / 'stderr').read_text(errors='replace')[-1500:]}"
            now = self._seconds()
            if now > worked or self._is_busy():
                worked, since = now, time.monotonic()
            if now - start > most or time.monotonic() - since > ASLEEP:
                return "hang"

    def _seconds(self) -> float:
        """Processor time of the process and its children so far."""
        assert self.process is not None
        fields = self._stat(Path(f"/proc/{self.process.pid}/stat"))
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def _is_busy(self) -> bool:
        """Whether a thread runs, waits for a core or for a disk: on a loaded machine that may take long."""
        assert self.process is not None
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/stat")
        return any(self._stat(task)[:1] in (["R"], ["D"]) for task in tasks)

    @staticmethod
    def _stat(path: Path) -> list[str]:
        try:
            return path.read_text().rpartition(")")[2].split()
        except OSError:
            return []

    def close(self) -> None:
        """Ends the process and all that it started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        self.process = None


if __name__ == "__main__":
    main()
