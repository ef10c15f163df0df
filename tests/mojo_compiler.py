"""Where tests find the Mojo compiler, which an installation needs no more."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def mojo() -> str | None:
    """The compiler on PATH or beside this Python."""
    return shutil.which("mojo", path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)]))
