"""The table of figures, and the folder of inputs that failed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from .worker import OUTCOMES

GOOD = OUTCOMES[:2]


class Figures:
    """How many inputs of each format ended how; those that failed are kept in `folder`, each with its command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: dict[str, Counter[str]] = {}
        self.failures: list[str] = []

    def add(self, name: str, index: int, path: Path, job: dict[str, Any], outcome: str, text: str, note: str) -> None:
        self.counts.setdefault(name, Counter())[outcome] += 1
        if outcome in GOOD:
            return
        kept = self.folder / f"{name}-{index}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        _copy(path, kept / path.name)
        _copy(Path(job["seed"]), kept / "seed" / Path(job["seed"]).name)
        about = {"outcome": outcome, "text": text, "change": note, "file": path.name, "job": job}
        (kept / "about.json").write_text(json.dumps(about, indent=1))
        first = text.strip().splitlines()[-1] if text.strip() else ""
        self.failures.append(
            f"{name} {index}: {outcome} ({note})\n  {first[:300]}\n  python -m tests.fuzz --replay {kept}"
        )

    def table(self) -> str:
        """A row per format and their sum, in Markdown."""
        rows = [["inputs", "tried", *OUTCOMES]]
        total: Counter[str] = Counter()
        for name, counts in self.counts.items():
            total += counts
            rows.append([name, str(counts.total()), *(str(counts[outcome]) for outcome in OUTCOMES)])
        rows.append(["**all**", str(total.total()), *(str(total[outcome]) for outcome in OUTCOMES)])
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def failed(self) -> bool:
        return any(counts[outcome] for counts in self.counts.values() for outcome in OUTCOMES if outcome not in GOOD)


def _copy(source: Path, target: Path) -> None:
    """A file or folder as it is, with its links and pipes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and not source.is_symlink():
        target.mkdir()
        for entry in source.iterdir():
            _copy(entry, target / entry.name)
    elif source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_fifo():
        import os

        os.mkfifo(target)
    elif source.exists():
        shutil.copy(source, target)
