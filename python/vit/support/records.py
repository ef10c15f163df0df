"""The one reader of JSON and YAML that comes from files: limits on size and depth, and kinds checked key by key.

record = Record.read(path / "model.json")
name = record.text("name")                            # refused by file and key if it is missing or no text
eps = record.number("layer_norm_eps", 1e-6, low=0.0)  # a default makes the key optional
record.finish()                                       # refuses the keys that nothing asked for
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .extras import require

#: Far above any record of ours or of the hub (a config.json with 21,843 class names has 1.1 MB), far below a bomb.
MAX_BYTES = 64 << 20
MAX_DEPTH = 64

#: Stands for "no default": the key must be there.
REQUIRED: Any = object()


class RecordError(ValueError):
    """A record that cannot be read, or that says something it cannot mean; the text names the file and the key."""


def parse_json(text: str | bytes, source: str) -> Any:
    """The value of a JSON text.

    Raises RecordError for what is not JSON (NaN and Infinity are not), a name that stands twice in one object, or
    more than MAX_BYTES or MAX_DEPTH.
    """
    _check_size(len(text), source)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise RecordError(f"vit: {source} is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:  # UnicodeDecodeError and json's own are kinds of it
        raise RecordError(f"vit: {source} is not JSON: {error}") from error
    _check_depth(value, source)
    return value


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises OSError, or RecordError as `parse_json`."""
    return parse_json(read_regular(path), str(path))


def parse_yaml(text: str | bytes, source: str) -> Any:
    """The value of a YAML text of plain values. Raises RecordError as `parse_json`, and for anchors and aliases, with
    which 700 bytes can stand for a gigabyte."""
    yaml = require("yaml", "train")
    _check_size(len(text), source)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if getattr(event, "anchor", None) is not None:
                raise RecordError(f"vit: {source} uses the anchor or alias {event.anchor!r}; write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise RecordError(f"vit: {source} is nested more than {MAX_DEPTH} deep")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_unique_keys(yaml, root, source)
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecordError(f"vit: {source} is not valid YAML: {error}") from error
    except (ValueError, OverflowError) as error:  # a date such as 2026-13-45
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"vit: {source} holds a value that YAML cannot read: {error}") from error


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises OSError, or RecordError as `parse_yaml`."""
    return parse_yaml(read_regular(path), str(path))


def shown(value: Any, limit: int = 60) -> str:
    """repr(value), cut to `limit` characters: for error texts about values from files."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class Record:
    """Names and values of a file, read by key and kind. Every method raises RecordError with file, key and value."""

    def __init__(self, values: Any, source: str) -> None:
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise RecordError(f"vit: {source} must hold names and values, not {shown(values)}")
        self.values = values
        self.source = source
        self._asked: set[str] = set()

    @classmethod
    def read(cls, path: Path) -> Record:
        """The record in a .json, .yaml or .yml file."""
        return cls((read_json if path.suffix == ".json" else read_yaml)(path), str(path))

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def raw(self, key: str, default: Any = REQUIRED) -> Any:
        """The value as it stands in the file."""
        self._asked.add(key)
        value = self.values.get(key, default)
        if value is REQUIRED:
            raise RecordError(f"vit: {self.source} lacks {key}")
        return value

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        """A text."""
        return self._of(key, default, str, "a text")

    def boolean(self, key: str, default: Any = REQUIRED) -> Any:
        """true or false."""
        return self._of(key, default, bool, "true or false")

    def choice(self, key: str, allowed: Iterable[Any], default: Any = REQUIRED) -> Any:
        """One of the allowed values."""
        value, allowed = self.raw(key, default), list(allowed)
        if value is default or any(value == one and type(value) is type(one) for one in allowed):
            return value
        self.refuse(key, f"one of {', '.join(map(str, allowed))}")

    def integer(self, key: str, default: Any = REQUIRED, low: int = -(2**63), high: int = 2**63 - 1) -> Any:
        """A whole number from low to high."""
        value = self._of(key, default, int, "a whole number")
        if value is not default and (isinstance(value, bool) or not low <= value <= high):
            self.refuse(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: Any = REQUIRED, low: float = -math.inf, high: float = math.inf) -> Any:
        """A finite number from low to high, as a float."""
        value = self.raw(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self.refuse(key, "a finite number")
        if not low <= value <= high:
            self.refuse(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def texts(self, key: str, default: Any = REQUIRED) -> Any:
        """A list of texts, as a tuple."""
        return self._list(key, default, lambda item: isinstance(item, str), "a list of texts")

    def numbers(self, key: str, default: Any = REQUIRED, count: int | None = None) -> Any:
        """A list of finite numbers, `count` of them where given, as a tuple of floats."""
        what = f"a list of {count if count is not None else 'finite'} numbers"
        value = self._list(key, default, _is_finite, what)
        if value is default:
            return value
        if count is not None and len(value) != count:
            self.refuse(key, what)
        return tuple(float(item) for item in value)

    def record(self, key: str, default: Any = REQUIRED) -> Any:
        """The names and values below the key, as a Record of their own."""
        value = self.raw(key, default)
        return value if value is default else Record(value, f"{self.source}: {key}")

    def finish(self) -> None:
        """Refuses the keys that none of the calls above asked for."""
        if unknown := [key for key in self.values if key not in self._asked]:
            raise RecordError(f"vit: {self.source} says {', '.join(map(shown, unknown))}, which is not known here")

    def refuse(self, key: str, wanted: str) -> NoReturn:
        """Raises: the key's value is not what is wanted."""
        raise RecordError(f"vit: {self.source}: {key} is {shown(self.values.get(key))}; it must be {wanted}")

    def _of(self, key: str, default: Any, kind: type, what: str) -> Any:
        value = self.raw(key, default)
        if value is not default and not isinstance(value, kind):
            self.refuse(key, what)
        return value

    def _list(self, key: str, default: Any, fits: Any, what: str) -> Any:
        value = self.raw(key, default)
        if value is default:
            return value
        if not isinstance(value, list) or not all(map(fits, value)):
            self.refuse(key, what)
        return tuple(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"{shown(twice)} stands twice in one object")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_regular(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit`. A pipe would wait for its writer, a device may have no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RecordError(f"vit: {path} is no regular file")
        _check_size(status.st_size, str(path), limit)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit + 1)
    finally:
        os.close(descriptor)


def _check_size(size: int, source: str, limit: int = MAX_BYTES) -> None:
    if size > limit:
        raise RecordError(f"vit: {source} has {size} bytes; a record has at most {limit}")


def _check_depth(value: Any, source: str) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RecordError(f"vit: {source} is nested more than {MAX_DEPTH} deep")
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, (dict, list))
        ]


def _check_unique_keys(yaml: Any, root: Any, source: str) -> None:
    nodes = [root] if root is not None else []
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
                raise RecordError(f"vit: {source}: {shown(twice)} stands twice")
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
