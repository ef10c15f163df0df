"""Types of arguments that commands share; what they refuse is bad usage: exit code 2."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def positive(text: str) -> int:
    """A whole number from 1."""
    return _at_least(1, text)


def count(text: str) -> int:
    """A whole number from 0."""
    return _at_least(0, text)


def _at_least(low: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"must be {low} or more, got {value}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _between(0.0, text)


def cosine(text: str) -> float:
    """A number from -1 to 1."""
    return _between(-1.0, text)


def _between(low: float, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not low <= value <= 1.0:  # nan is none of them
        raise argparse.ArgumentTypeError(f"must be from {low:g} to 1, got {value}")
    return value


def filled(text: str) -> str:
    """A text that says something: what a script's unset variable gives would be taken for the current folder, or for
    an option that is not there."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def device(text: str) -> str:
    """A device as torch names it."""
    import torch

    try:
        return str(torch.device(text))
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be like cpu, cuda:0 or xpu, got {text!r}") from None


def new_file(text: str) -> str:
    """A file to write: found out before the work, not after it, that this cannot be."""
    folder = Path(text).absolute().parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {folder}")
    if Path(text).is_dir() or not os.access(text if Path(text).exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written")
    return text


def json_target(text: str) -> str:
    """A file to write, or - for standard output."""
    return text if text == "-" else new_file(text)
