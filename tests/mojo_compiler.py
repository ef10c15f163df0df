"""Where tests find the Mojo compiler, which an installation needs no more."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def mojo() -> str | None:
    """The compiler beside this Python or on PATH."""
    return shutil.which("mojo", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
