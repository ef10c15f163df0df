"""Tables and progress: rich on a terminal, plain text in a pipe, plain text where rich is missing."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
from vit.cli.show import Progress, aligned, save_json, table
from vit.support.extras import interactive


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROWS = [("linear [0]", "1.25"), ("gelu", "10.50")]


def test_a_pipe_gets_aligned_lines():
    out = io.StringIO()
    table(("op", "ms"), ROWS, out, title="times")
    assert out.getvalue().splitlines() == ["times", "op             ms", "linear [0]   1.25", "gelu        10.50"]


def test_a_terminal_gets_a_title_and_every_cell_as_it_is(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    table(("op", "ms"), ROWS, out, title="times")
    for text in ("times", "linear [0]", "10.50", "\x1b["):
        assert text in out.getvalue()


def test_without_rich_a_terminal_gets_what_a_pipe_gets(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert not interactive(Terminal())
    out, pipe = Terminal(), io.StringIO()
    table(("op", "ms"), ROWS, out)
    table(("op", "ms"), ROWS, pipe)
    assert out.getvalue() == pipe.getvalue()


def test_progress_draws_on_a_terminal_and_leaves_it_while_something_is_printed(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Progress(2, out) as progress:
        progress.step("case [a]")
        with progress.aside():
            out.write("FAILED case [a]\n")
            drawn = len(out.getvalue())
        progress.step("case [b]")
    assert "FAILED case [a]\n" in out.getvalue()
    assert "case [b]" in out.getvalue()[drawn:]


def test_progress_is_silent_in_a_pipe():
    out = io.StringIO()
    with Progress(2, out) as progress, progress.aside():
        progress.step("case")
    assert out.getvalue() == ""


def test_reports_replace_files_and_are_written_to_pipes(tmp_path, capsys):
    target, link, pipe = tmp_path / "report.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(target)
    save_json({"a": 1}, str(link))
    save_json({"a": 2}, str(link))
    assert json.loads(target.read_text()) == {"a": 2}
    assert link.is_symlink()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    save_json({"a": 3}, str(pipe))
    assert json.loads(os.read(reader, 100)) == {"a": 3}
    os.close(reader)
    assert pipe.is_fifo()
    save_json({"a": 4}, "-")
    assert capsys.readouterr().out == '{"a": 4}\n'
    save_json({"a": 5}, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "pipe", "report.json"]


def test_words_left_figures_right():
    assert aligned([("a", "b", "1"), ("aa", "bb", "10")], left=2) == ["a   b    1", "aa  bb  10"]


@pytest.mark.parametrize("rows", [[], [("x", "1")]])
def test_a_table_without_rows_still_names_its_columns(rows):
    out = io.StringIO()
    table(("op", "ms"), rows, out)
    assert out.getvalue().splitlines()[0].split() == ["op", "ms"]
