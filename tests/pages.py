"""The pages that say how to extend vit: their blocks, and what becomes of a copy of the tree that follows them.

A block of code belongs to the line before it: "New file `path`:" or "In `path`, before|after|in place of `text`:". The
text stands in exactly one line of the file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What the blocks change, and what a build and `import vit` need.
PARTS = ("CMakeLists.txt", "mkdocs.yml", "pyproject.toml", "build_backend", "csrc", "docs/kernels", "python/vit")
TESTS = ("tests/conftest.py", "tests/draw.py", "tests/rounding.py", "tests/ops")
STEP = re.compile(
    r"^(?:New file `(?P<new>[^`]+)`|In `(?P<path>[^`]+)`, (?P<how>before|after|in place of) `(?P<text>[^`]+)`):\n\n"
    r"```\w*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Changed:
    """Files that a page made, and files that it edited."""

    new: frozenset[str]
    edited: frozenset[str]


def copy_tree(to: Path) -> Path:
    """What a page needs of the tree, without what was built in it."""
    for part in PARTS + TESTS:
        source, target = ROOT / part, to / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json"))
        else:
            shutil.copy(source, target)
    return to


def follow(page: str, tree: Path, section: str = "") -> Changed:
    """Applies the steps of a page, or those below one of its headings, to a copy of the tree."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    if section:
        text = re.split(rf"^## {re.escape(section)}$", text, flags=re.MULTILINE)[1].split("\n## ")[0]
    new, edited = set(), set()
    for step in STEP.finditer(text):
        if step["new"]:
            path = tree / step["new"]
            assert not path.exists(), f"{step['new']} exists"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step["code"], encoding="utf-8")
            new.add(step["new"])
        else:
            _edit(tree / step["path"], step["how"], step["text"], step["code"])
            edited.add(step["path"])
    assert text.count("\n```") == 2 * len(STEP.findall(text)), f"{page} {section} has a block that belongs to no file"
    return Changed(frozenset(new), frozenset(edited))


def _edit(path: Path, how: str, text: str, code: str) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found = [i for i, line in enumerate(lines) if text in line]
    assert len(found) == 1, f"{path}: {text!r} stands in {len(found)} lines"
    (at,) = found
    lines[at + (how == "after") : at + (how != "before")] = [code]
    path.write_text("".join(lines), encoding="utf-8")


def run(tree: Path, *command: str) -> str:
    """The output of a command in the copy, whose `vit` it imports; fails with all of it."""
    environment = os.environ | {"PYTHONPATH": str(tree / "python"), "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(tree: Path, *arguments: str) -> str:
    """Python in the copy."""
    return run(tree, sys.executable, *arguments)


def build(tree: Path, backend: str, *options: str) -> None:
    """Compiles a backend into the copy."""
    folder = str(tree / "build" / backend)
    run(tree, "cmake", "-S", ".", "-B", folder, "-G", "Ninja", f"-DVIT_BACKEND={backend}",
        f"-DPython_EXECUTABLE={sys.executable}", *options)  # fmt: skip
    run(tree, "cmake", "--build", folder)
    run(tree, "cmake", "--install", folder, "--prefix", str(tree / "python" / "vit"))
