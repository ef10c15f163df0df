"""The `vit` command. Each command is one module here with HELP, add_arguments(parser) and run(args) -> exit
code.

Exit codes: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

COMMANDS = ("info", "train", "eval", "predict", "parity", "bench", "quantize")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors a user can do something about are one text on standard error, without a
    traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(words)
        finally:
            # here, so that a closed pipe is noticed below and not by the interpreter's exit
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the pipe has seen enough (`vit info | head`); what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("vit: interrupted", file=sys.stderr)
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        from ..version import __version__

        print(f"vit {__version__}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean vit {near[0]}?" if near else "."
        print(f"vit: there is no command {name!r}{hint} Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = _command(name)
    parser = argparse.ArgumentParser(prog=f"vit {name}", description=command.HELP)
    command.add_arguments(parser)
    try:
        args = parser.parse_args(words[1:])
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return int(command.run(args))
    except BrokenPipeError:
        raise
    except _expected() as error:
        text = str(error) or type(error).__name__
        print(text if text.startswith("vit: ") else f"vit: {text}", file=sys.stderr)
        return 1


def _expected() -> tuple[type[BaseException], ...]:
    """Errors that say all there is to say. Others are defects of vit, and their traceback is wanted."""
    from ..backends import BackendError
    from ..support.extras import MissingExtra
    from ..weights import WeightsError

    return (BackendError, MissingExtra, WeightsError, ValueError, OSError)


def _command(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _overview() -> str:
    lines = ["usage: vit COMMAND [options]    (vit COMMAND --help lists them)", ""]
    for name in COMMANDS:
        lines.append(f"  {name:<10} {_command(name).HELP}")
    return "\n".join(lines)
