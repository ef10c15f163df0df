"""What the run folders below a folder say of themselves, beside each other."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import tasks
from ..support.lock import NAME as LOCK
from ..support.records import Record, read_json
from .config import FIELDS
from .record import NAME as RECORD
from .resume import FREE
from .run import Run

MOST_OPTIONS = 6  # that the table shows; --json has all that differ


def find_runs(folder: Path) -> list[Path]:
    """The run folders in a folder, or the folder itself, by name and number; none below a run.

    ValueError where there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"vit: there is no folder {folder}; vit train makes runs/, or give the folder of your runs")
    return list(_below(folder))


def _below(folder: Path) -> Iterator[Path]:
    if (folder / "config.yaml").is_file():
        yield folder
        return
    try:
        entries = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
    except PermissionError:
        return
    for entry in sorted(entries, key=lambda entry: _natural(entry.name)):
        if not entry.name.startswith("."):
            yield from _below(entry)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """digits-2 before digits-10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.findall(r"\d+|\D+", name)]


def summary(path: Path) -> dict[str, Any]:
    """The figures of a run folder under the names that metrics.jsonl has, what its options are, and how it ended.

    Raises ValueError where the folder is damaged.
    """
    run = Run.open(path)
    lines = run.read_metrics() if run.metrics.is_file() else []
    epochs = [line for line in lines if "epoch" in line]
    final: dict[str, Any] = next((line for line in reversed(lines) if line.get("final")), {})
    metric = tasks.get(run.config.task).metric
    best = _best(epochs, final, metric)
    last = epochs[-1] if epochs else {}
    return {
        "run": str(path),
        "model": run.model["name"],
        "data": run.config.data,
        "task": run.config.task,
        "state": _state(run, bool(final)),
        "epochs": len(epochs),
        "of_epochs": run.config.epochs,
        "best_epoch": best.get("epoch"),
        "metric": metric,
        f"val_{metric}": final.get(f"val_{metric}", best.get(f"val_{metric}")),
        "val_loss": final.get("val_loss", best.get("val_loss")),
        f"test_{metric}": final.get(f"test_{metric}"),
        "test_loss": final.get("test_loss"),
        "train_loss": last.get("train_loss"),
        "images_per_second": last.get("images_per_second"),
        "seconds": final.get("seconds", last.get("seconds")),
        "options": {name: getattr(run.config, name) for name in FIELDS},
    }


def _best(epochs: Sequence[dict[str, Any]], final: dict[str, Any], metric: str) -> dict[str, Any]:
    """The epoch whose weights are kept: the noted one, and of an unfinished run the first of the best figures."""
    noted = next((line for line in epochs if line["epoch"] == final.get("best_epoch")), None)
    if noted:
        return noted
    measured = [line for line in epochs if line.get(f"val_{metric}") is not None]
    return max(measured, key=lambda line: float(line[f"val_{metric}"]), default=epochs[-1] if epochs else {})


def _state(run: Run, finished: bool) -> str:
    """finished, running, killed, or the first words of the error that ended it."""
    if _is_running(run.path):
        return "running"
    try:
        session = Record(Record.read(run.path / RECORD).raw("sessions")[-1], RECORD)
        outcome = session.text("outcome") if session.raw("outcome") is not None else "killed"
    except (OSError, ValueError, LookupError, TypeError):  # no record: of an earlier version, or damaged
        outcome = "finished" if finished else "unknown"
    return str(outcome).partition(":")[0].lower() if outcome != "finished" else "finished"


def _is_running(path: Path) -> bool:
    """Whether the lock of the folder names a process that lives; of another machine's that cannot be told, so yes."""
    try:
        holder = Record(read_json(path / LOCK), LOCK)
        host, pid = holder.text("host"), holder.integer("pid", low=1)
    except (OSError, ValueError):
        return False
    return host != socket.gethostname() or os.path.exists(f"/proc/{pid}")


def differing(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The options in which the runs differ, without those that change no result."""
    found = [row["options"] for row in rows]
    names = [name for name in FIELDS if name not in FREE or name in ("data", "epochs")]
    return [name for name in names if any(one[name] != found[0][name] for one in found[1:])]


def described(row: dict[str, Any], names: Sequence[str]) -> str:
    """The options `names` of a run: lr=0.001 arch.depth=4."""
    words = []
    for name in names:
        value = row["options"][name]
        if isinstance(value, dict):
            words += [f"{key}={item}" for key, item in value.items()]
        else:
            words.append(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}")
    return " ".join(words)
