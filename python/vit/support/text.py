"""Texts that come from files, as a terminal may show them."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text with control characters, lone surrogates and line ends written as escapes (\x1b, \udcff, \n)."""
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text)
