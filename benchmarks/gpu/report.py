"""The figures of one part, kept as they come."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from vit.support.files import to_json, write_text


class Report:
    """The figures of one part, printed and kept as they come, and the clock that ends it."""

    def __init__(self, part: str, seconds: float, only: str | None, out: Path | None, environment: dict[str, Any]):
        self.end = time.monotonic() + seconds
        self.only = re.compile(only) if only else None
        self.failed = False
        self.out = out
        self.content: dict[str, Any] = json.loads(out.read_text()) if out and out.exists() else {}
        rows = self.content.get(part, {}).get("results", []) if only else []  # what the pattern takes up comes on top
        self.record: dict[str, Any] = {"environment": environment, "failed": False, "results": rows}
        self.content[part] = self.record

    def wanted(self, name: str) -> bool:
        """Whether to run `name`: it matches --only, and there is time."""
        if self.only and not self.only.search(name):
            return False
        if time.monotonic() > self.end:
            self.add(name, not_run="out of time")
            return False
        return True

    def add(self, name: str, **figures: Any) -> None:
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items()}
        rows = self.record["results"]
        rows[:] = [row for row in rows if row["name"] != name or "failed" in row] + [{"name": name, **rounded}]
        self.record["failed"] = self.failed
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.out, to_json(self.content, indent=1) + "\n")
        print(f"{name:<46} " + "  ".join(f"{k}={v}" for k, v in rounded.items()), flush=True)

    def fail(self, name: str, text: str) -> None:
        self.failed = True
        self.add(name, failed=text)
