"""Trying many inputs: seeds are made once, every input by its number, workers take turns."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .formats import FORMATS, Change, job_of, make, seeds_of
from .report import Figures
from .worker import Worker


def fuzz(
    work: Path,
    out: Path,
    names: Sequence[str],
    seed: int,
    minutes: float | None = None,
    jobs: int = 2,
    say: Callable[[str], None] = lambda text: None,
) -> Figures:
    """Tries the inputs of these formats: each format's fixed count, or as many as `minutes` allow, in equal times.

    work: an empty folder for seeds and inputs; out: where inputs are kept that fail.
    """
    make_seeds(work / "seeds")
    figures, lock = Figures(out), threading.Lock()
    seeds = {name: seeds_of(name, work / "seeds") for name in names}
    digests = _digests(work, {name: found for name, found in seeds.items() if found})
    tasks = _tasks([name for name in names if seeds[name]], minutes)

    def work_on(place: int) -> None:
        worker = Worker(work / f"worker-{place}")
        try:
            while True:
                with lock:
                    task = next(tasks, None)
                if task is None:
                    return
                name, index = task
                to = work / "inputs" / f"{name}-{index}"
                path, source, change = make(name, seed, index, seeds[name], to)
                job = job_of(name, path, source, change, digests[str(source), FORMATS[name].use])
                outcome, text = worker.run(job)
                with lock:
                    figures.add(name, index, path, job, outcome, text, change.note)
                    if index % 1000 == 999:
                        say(f"{name}: {index + 1}")
                shutil.rmtree(to, ignore_errors=True)
        except BaseException as error:
            errors.append(error)
        finally:
            worker.close()

    errors: list[BaseException] = []
    threads = [threading.Thread(target=work_on, args=(place,)) for place in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return figures


def make_seeds(folder: Path) -> None:
    """The seeds, made in a process of their own."""
    folder.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
    command = [sys.executable, "-m", f"{__package__}.seeds", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"the seeds cannot be made:\n{done.stderr[-4000:]}")


def _digests(work: Path, seeds: dict[str, list[Path]]) -> dict[tuple[str, str], str]:
    """What each seed gives undamaged; RuntimeError for one that is not read."""
    digests = {}
    worker = Worker(work / "worker-0")
    try:
        for name, paths in seeds.items():
            for path in paths:
                copy = work / "inputs" / f"sound-{name}" / path.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
                if name == "words":
                    copy.write_text('["info", "vit_tiny_patch16_224", "--json"]')
                outcome, text = worker.run(job_of(name, copy, path, Change("none"), ""))
                if outcome != "right":
                    raise RuntimeError(f"the sound {name} {path.name} ends as {outcome}: {text}")
                digests[str(path), FORMATS[name].use] = text
    finally:
        worker.close()
    return digests


def _tasks(names: Sequence[str], minutes: float | None) -> Iterator[tuple[str, int]]:
    if minutes is None:
        for name in names:
            yield from ((name, index) for index in range(FORMATS[name].count))
        return
    end = time.monotonic() + 60 * minutes
    index = dict.fromkeys(names, 0)
    while time.monotonic() < end:
        for name in names:  # cheap formats get more turns
            for _ in range(max(1, round(0.5 / FORMATS[name].seconds))):
                yield name, index[name]
                index[name] += 1
                if time.monotonic() > end:
                    return
