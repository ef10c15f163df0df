"""The `vit` command. Each command is one module here with HELP, add_arguments(parser) and run(args) -> exit
code.

Exit codes: 0 done, 1 failed, 2 bad usage, 128 + its number after a signal (130 SIGINT, 143 SIGTERM, 129 SIGHUP).
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ..support import stop
from ..support.files import said
from ..support.text import printable
from .arguments import filled

COMMANDS = (
    "info", "train", "eval", "predict", "data", "runs", "sweep", "viz", "parity", "bench", "quantize", "convert",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors a user can do something about are one text on standard error, without a
    traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        stop.listen()
    if sys.stdout is None:  # `>&-`: Python would drop the answer without a word
        print("vit: standard output is closed; send it to a file or to /dev/null", file=sys.stderr)
        return 1
    _speak()
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
    except OSError as error:  # of the flush: a full disk
        print(f"vit: cannot write the output: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:  # of a program that calls this: the command itself has a handler
        print("vit: stopped by SIGINT", file=sys.stderr)
        return 130


def _speak() -> None:
    """Output may hold any name: what the stream's encoding lacks is written as an escape. Pillow's remarks about a
    picture and PyTorch's about the number of workers stay out of it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more --workers than cores were asked for


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
    parser = Parser(prog=f"vit {name}", description=command.HELP)
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
        text = "\n".join(map(printable, said(error).split("\n"))) or type(error).__name__
        print(text if text.startswith("vit: ") else f"vit: {text}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        why = printable(str(error).partition("\n")[0])
        print(f"vit: not enough memory; a smaller model or --batch-size needs less ({why})", file=sys.stderr)
        return 1


class Parser(argparse.ArgumentParser):
    """Takes options by their whole names, and for an unknown one names the nearest."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        for kind in (None, str):
            self.register("type", kind, filled)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return found
        word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        what = "unknown option" if word.startswith("-") else "unexpected argument"
        near = self._nearest(word) if word.startswith("-") else []
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        print(f"usage: {self.prog} ...    ({self.prog} --help lists all options)", file=sys.stderr)
        self.exit(2, f"{self.prog}: error: {what} {printable(word)}{hint}\n")

    def _nearest(self, word: str) -> list[str]:
        """Options that begin with the word, that are the initials of its words (--learning-rate: --lr) or whose
        initials it is (--bs: --batch-size), or like it."""
        options = [option for option in self._option_string_actions if option.startswith("--")]
        plain = word.lower().replace("_", "-")
        longer = [option for option in options if plain.strip("-") and option.startswith(plain)]
        short = [option for option in options if option == _initials(plain) or _initials(option) == plain]
        alike = difflib.get_close_matches(plain, options, n=3, cutoff=0.7)
        return list(dict.fromkeys(longer + short + alike))[:3] or difflib.get_close_matches(plain, options, n=1)


def _initials(option: str) -> str:
    return "--" + "".join(part[0] for part in option.strip("-").split("-") if part)


def _expected() -> tuple[type[BaseException], ...]:
    """Errors that say all there is to say. Others are defects of vit, and their traceback is wanted."""
    from ..backends import BackendError
    from ..support.extras import MissingExtra
    from ..weights import WeightsError

    return (BackendError, MissingExtra, WeightsError, ValueError, OSError)


_LACKS_MEMORY = ("DefaultCPUAllocator", "Storage size calculation overflowed")


def _is_lack_of_memory(error: BaseException) -> bool:
    """Of the CPU PyTorch says it in a RuntimeError without a class of its own."""
    import torch

    out_of_memory = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, out_of_memory) or any(words in str(error) for words in _LACKS_MEMORY)


def _command(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _overview() -> str:
    lines = ["usage: vit COMMAND [options]    (vit COMMAND --help lists them)", ""]
    for name in COMMANDS:
        lines.append(f"  {name:<10} {_command(name).HELP}")
    return "\n".join(lines)
