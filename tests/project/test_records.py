"""Records from files: what is damaged, of another kind or out of proportion is named by file and key."""

from __future__ import annotations

import os
import re
import time

import pytest
from vit.support.records import MAX_DEPTH, Record, RecordError, parse_json, parse_yaml, read_json, read_yaml
from vit.support.text import printable


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than 64 deep"),
        ("[" * 100_000, "nested more than 64 deep"),
    ],
)
def test_json_that_is_refused(text, why):
    with pytest.raises(RecordError, match=f"vit: x.json.*{re.escape(why)}"):
        parse_json(text, "x.json")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: [", "is not valid YAML"),
        ("a: &x 1\nb: *x", "anchor or alias 'x'"),
        ("a: 1\na: 2", "'a' stands twice"),
        ("b:\n  - {c: 1, c: 2}", "'c' stands twice"),
        ("[" * 5000, "nested more than 64 deep"),
        ("a: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("a: 2026-13-45", "cannot read"),
        (b"a: \xff", "is not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text, why):
    with pytest.raises(RecordError, match=f"vit: x.yaml.*{re.escape(why)}"):
        parse_yaml(text, "x.yaml")


def test_yaml_of_nested_aliases_is_refused_at_once():
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    begin = time.perf_counter()
    with pytest.raises(RecordError, match="anchor"):
        parse_yaml("\n".join(lines), "x.yaml")
    assert time.perf_counter() - begin < 1.0


@pytest.mark.parametrize(
    ("ask", "value", "why"),
    [
        ("text", 5, "it must be a text"),
        ("boolean", 1, "it must be true or false"),
        ("integer", True, "it must be a whole number"),
        ("integer", 1.5, "it must be a whole number"),
        ("integer", 2**70, "it must be a whole number"),
        ("number", "1e6", "it must be a finite number"),
        ("number", True, "it must be a finite number"),
        ("texts", "abc", "it must be a list of texts"),
        ("texts", ["a", 1], "it must be a list of texts"),
        ("numbers", [0.5, None], "it must be a list of finite numbers"),
        ("record", [1], "must hold names and values"),
    ],
)
def test_values_of_other_kinds(ask, value, why):
    with pytest.raises(RecordError, match=f"vit: x.json: key.*{why}"):
        getattr(Record({"key": value}, "x.json"), ask)("key")


def test_values_of_the_right_kind():
    record = Record({"t": "a", "b": False, "i": 3, "n": 1, "ts": ["a"], "ns": [1, 0.5], "r": {"c": "x"}}, "x.json")
    assert (record.text("t"), record.boolean("b"), record.integer("i", low=3, high=3)) == ("a", False, 3)
    assert (record.number("n", high=1.0), record.texts("ts"), record.numbers("ns", count=2)) == (
        1.0,
        ("a",),
        (1.0, 0.5),
    )
    assert record.record("r").choice("c", ["x", "y"]) == "x"
    assert record.text("none", None) is None
    record.finish()


def test_missing_unknown_and_out_of_range():
    record = Record({"eps": 2.0, "other": 1}, "x.json")
    with pytest.raises(RecordError, match=r"vit: x\.json lacks name"):
        record.text("name")
    with pytest.raises(RecordError, match=r"vit: x\.json: eps is 2\.0; it must be a number from 0 to 1"):
        record.number("eps", low=0, high=1)
    with pytest.raises(RecordError, match="says 'other', which is not known here"):
        record.finish()
    with pytest.raises(RecordError, match="it must be one of 1, 2"):
        Record({"a": True}, "x.json").choice("a", [1, 2])


def test_long_values_are_cut_and_files_are_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"name": [' + ", ".join(["1"] * 10_000) + "]}")
    with pytest.raises(RecordError) as error:
        Record.read(path).text("name")
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 200 + len(str(path))
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_printable():
    assert printable("äpfel \x1b[31m\n\udcff") == "äpfel \\x1b[31m\\n\\udcff"


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_is_no_regular_file_is_named_at_once(read, tmp_path):
    """A pipe waits for its writer, a device has no end."""
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("device", "folder", "pipe"):
        with pytest.raises(RecordError, match=f"{name} is no regular file"):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")
