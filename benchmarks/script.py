"""What the scripts of this folder that race a few candidates share: their options, the race, the report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from vit.bench.peak import cpu_peak
from vit.bench.race import Setting, environment
from vit.bench.workers import Candidate, Failure, Worker, race

Records = list[dict[str, Any]]


def raced(
    make: Callable[..., Candidate], jobs: Sequence[tuple[Any, ...]], rounds: int
) -> list[tuple[dict[str, float], Any]]:
    """Races make(*job) of every job, each in a process of its own; the times and the result of each."""
    workers = [Worker(torch.get_num_threads()) for _ in jobs]
    try:
        found = []
        for worker, outcome in zip(workers, race(workers, make, jobs, rounds), strict=True):
            if isinstance(outcome, Failure):
                raise RuntimeError(outcome.reason)
            times = {"ms_median": 1e3 * outcome.median, "ms_min": 1e3 * outcome.best}
            found.append((times, worker.request("result")))
        return found
    finally:
        for worker in workers:
            worker.stop()


def run(description: str | None, measure: Callable[[int], Records], arguments: Sequence[str] | None = None) -> None:
    """Calls measure(rounds) and writes its records beside the machine's facts where --json says. arguments: what is
    left of those of the command."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    records, threads = measure(args.rounds), torch.get_num_threads()
    if args.json:
        setting = Setting(("cpu",), "cpu", threads, args.rounds, cpu_peak(threads))
        report = {"environment": environment(setting), "records": records}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
