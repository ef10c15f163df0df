"""The sizes that the project keeps to, so that a file is read in one go and a function on one screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("python/vit", "csrc", "benchmarks", "build_backend", "examples", "scripts", "docs/assets")
SUFFIXES = ("", ".py", ".h", ".cpp", ".cu", ".cuh", ".hpp", ".mojo", ".in", ".def", ".cmake", ".txt")
FILE_LINES, FUNCTION_LINES = 400, 80
#: A file that has a reason to be longer gives it after these words.
REASON = "Longer than 400 lines: "


def too_long(path: Path) -> Iterator[str]:
    """The file, and its functions in Python, that exceed the limits."""
    text = path.read_text(encoding="utf-8")
    if (lines := text.count("\n")) > FILE_LINES and REASON not in text:
        yield f"{path.name}: {lines} lines"
    for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if (lines := (node.end_lineno or first) - first + 1) > FUNCTION_LINES:
                yield f"{path.name}, {node.name}: {lines} lines"


def sources(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES and path.is_file()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_functions_are_short(folder: str) -> None:
    assert sources(folder), folder
    assert not [text for path in sources(folder) for text in too_long(path)]


def test_what_is_too_long_is_found(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("@property\nasync def method():\n" + "    pass\n" * 79 + "\n" * 320)
    assert list(too_long(path)) == ["long.py: 401 lines", "long.py, method: 81 lines"]
    path.write_text("def function():\n" + "    pass\n" * 79 + "\n" * 320)
    assert not list(too_long(path))
    kernel = tmp_path / "long.cu"
    kernel.write_text("\n" * 401)
    assert list(too_long(kernel)) == ["long.cu: 401 lines"]
    kernel.write_text(f"// {REASON}one program\n" + "\n" * 400)
    assert not list(too_long(kernel))
