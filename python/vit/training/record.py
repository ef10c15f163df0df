"""run.json: by which commands, on which machine, with which versions and when a run was made."""

from __future__ import annotations

import hashlib
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..support.files import to_json, write_text
from ..support.records import Record
from .environment import description
from .run import Run

NAME = "run.json"


class RunRecord:
    """The sessions of a run: one for its start and one for each time it went on. Written at the beginning and at the
    end of a session, so that a killed one has no end."""

    def __init__(self, run: Run, plan: dict[str, str], step: int) -> None:
        self.run = run
        path = run.path / NAME
        self.sessions: list[Any] = []
        if path.is_file():
            self.sessions = _sessions(path)
        self.session: dict[str, Any] = {
            "command": sys.argv,
            "folder": os.getcwd(),
            "process": os.getpid(),
            "started": _now(),
            "ended": None,
            "outcome": None,
            "from_step": step,
            "to_step": None,
            "config_sha256": hashlib.sha256((run.path / "config.yaml").read_bytes()).hexdigest(),
            "plan": plan,
            **description(plan),
        }
        self.sessions.append(self.session)
        self._write()

    def end(self, outcome: str, step: int) -> None:
        """Notes how the session ended: "finished", or the first line of an error's text."""
        self.session |= {"ended": _now(), "outcome": outcome, "to_step": step}
        self._write()

    def _write(self) -> None:
        write_text(
            self.run.path / NAME, to_json({"format": 1, "sessions": self.sessions}, indent=2, default=str) + "\n"
        )


def _sessions(path: Path) -> list[Any]:
    """Those of an existing run.json. ValueError where it is damaged, which stops no run for good."""
    try:
        record = Record.read(path)
        if not isinstance(sessions := record.raw("sessions", []), list):
            record.refuse("sessions", "a list")
        return sessions
    except ValueError as error:
        raise ValueError(f"{error}; nothing but the record of the sessions is in it, so remove it to go on") from error


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
