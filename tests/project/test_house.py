"""The sizes that the project keeps to, so that a file is read in one go and a function on one screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import vit

PACKAGE = Path(vit.__file__).parent
FILE_LINES, FUNCTION_LINES = 400, 80


def too_long(path: Path) -> Iterator[str]:
    """The file, and its functions, that exceed the limits."""
    text = path.read_text(encoding="utf-8")
    if (lines := text.count("\n")) > FILE_LINES:
        yield f"{path.name}: {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if (lines := (node.end_lineno or first) - first + 1) > FUNCTION_LINES:
                yield f"{path.name}, {node.name}: {lines} lines"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert not list(too_long(path))


def test_what_is_too_long_is_found(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("@property\nasync def method():\n" + "    pass\n" * 79 + "\n" * 320)
    assert list(too_long(path)) == ["long.py: 401 lines", "long.py, method: 81 lines"]
    path.write_text("def function():\n" + "    pass\n" * 79 + "\n" * 320)
    assert not list(too_long(path))
