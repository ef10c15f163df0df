"""Random changes: of bytes, of JSON values, of words. All of them depend on the Draw alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vit.support.random import Stream

T = TypeVar("T")

#: Numbers at which programs go wrong.
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 65535, 65536, 10**6, 10**9),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), -(10**30)),
)
TEXTS = (
    *("", "x", "0", "1e6", "nan", "../x", "/", "\x00", "\x1b[2J", "\n", "\udcff", "ä", "%s%n", "{}", "=1+1", "None"),
    *("relu", "gelu", "token", "avg", "bicubic", "A" * 5000),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [1], [1, 2, 3], ["x"], {"a": 1}, [None], {"": {}}),
    *(1.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
    *NUMBERS,
    *TEXTS,
)


class Draw:
    """Random choices that belong to a key."""

    def __init__(self, *key: int | str) -> None:
        self._stream = Stream("fuzz", *key)

    def below(self, count: int) -> int:
        """0 to count - 1; 0 where there is nothing to choose from."""
        return int(self._stream.integers(0, count, 1)[0]) if count > 1 else 0

    def chance(self, share: float) -> bool:
        return self.below(1000) < 1000 * share

    def of(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def small(self, most: int) -> int:
        """1 to `most`, small numbers more often."""
        return 1 + self.below(1 + self.below(most))

    def bytes(self, count: int) -> bytes:
        return bytes(self._stream.integers(0, 256, count).astype("u1")) if count else b""


def change_bytes(draw: Draw, data: bytes) -> bytes:
    """One to four changes anywhere, the beginning (a header, in most formats) more often."""
    out = bytearray(data)
    for _ in range(draw.small(4)):
        draw.of(_BYTES)(draw, out)
    return bytes(out)


def _place(draw: Draw, out: bytearray) -> int:
    return draw.below(min(len(out), 200) if draw.chance(0.5) else len(out))


def _flip(draw: Draw, out: bytearray) -> None:
    if out:
        out[_place(draw, out)] ^= 1 << draw.below(8)


def _set(draw: Draw, out: bytearray) -> None:
    if out:
        out[_place(draw, out)] = draw.of((0, 1, 0x7F, 0x80, 0xFF, draw.below(256)))


def _number(draw: Draw, out: bytearray) -> None:
    size, order = draw.of((2, 4, 8)), draw.of(("little", "big"))
    at = _place(draw, out)
    out[at : at + size] = (draw.of(NUMBERS) % (1 << 8 * size)).to_bytes(size, order)  # type: ignore[arg-type]


def _cut(draw: Draw, out: bytearray) -> None:
    del out[_place(draw, out) :]


def _remove(draw: Draw, out: bytearray) -> None:
    at = _place(draw, out)
    del out[at : at + draw.small(64)]


def _insert(draw: Draw, out: bytearray) -> None:
    at = _place(draw, out)
    out[at:at] = draw.bytes(draw.small(64))


def _repeat(draw: Draw, out: bytearray) -> None:
    at, size = _place(draw, out), draw.small(512)
    out[at:at] = out[at : at + size]


def _blank(draw: Draw, out: bytearray) -> None:
    at, size = _place(draw, out), draw.small(512)
    out[at : at + size] = draw.of((b"\x00", b"\xff")) * len(out[at : at + size])


def _more(draw: Draw, out: bytearray) -> None:
    out += draw.bytes(draw.small(64)) if draw.chance(0.5) else b"\x00" * draw.of((1, 64, 100_000))


_BYTES = (_flip, _flip, _set, _number, _number, _cut, _remove, _insert, _repeat, _blank, _more)


def change_json(draw: Draw, text: str) -> tuple[str, tuple[str, ...]]:
    """JSON with a change of one value, and the keys whose meaning must have changed with it.

    No keys where the change may mean the same: something left out, null, equal in Python, or one size for height and
    width.
    """
    value = json.loads(text)
    if draw.chance(0.1):
        return _break_json(draw, text), ()
    holder: Any = {"": value}
    places = list(_places(holder))
    keys, parent, key = draw.of(places)
    old = parent[key]
    kind = draw.below(10)
    if kind == 0 and parent is not holder:
        del parent[key]
        return json.dumps(holder[""]), ()
    if kind == 1 and isinstance(parent, dict) and parent is not holder:
        parent[draw.of(TEXTS)] = parent.pop(key)
        return _dump(holder[""]), ()
    if kind == 2 and isinstance(old, dict):
        old[draw.of((*TEXTS, *old))] = draw.of(VALUES)
        return _dump(holder[""]), ()
    new = draw.of(VALUES)
    if kind == 3:
        new = [old] * draw.small(5)
    elif kind == 4 and isinstance(old, (int, float)) and not isinstance(old, bool):
        new = draw.of((old * 2, old + 1, -old, str(old), float(old), old * 1000, old / 2))
    parent[key] = new
    repeated = isinstance(new, list) and bool(new) and all(item == old for item in new)
    differs = new is not None and new != old and not repeated
    return _dump(holder[""]), keys if differs else ()


def _dump(value: Any) -> str:
    return json.dumps(value)


def _break_json(draw: Draw, text: str) -> str:
    kind = draw.below(5)
    at = draw.below(len(text))
    if kind == 0:
        return draw.of(("[", '{"a":')) * draw.of((70, 5000, 100_000))
    if kind == 1 and "{" in text:  # one name twice
        key = draw.of([part for part in text.split('"') if part.strip(" :,{}[]\n")] or ["a"])
        return text.replace("{", f'{{"{key}": {json.dumps(draw.of(VALUES))}, ', 1)
    if kind == 2:
        return text[:at]
    if kind == 3:
        return text[:at] + draw.of(("{", "}", "[", "]", ",", ":", '"', "\\", "NaN", "\x00", "1e999")) + text[at:]
    return text[:at] + text[at + draw.small(20) :]


def _places(value: Any, keys: tuple[str, ...] = ()) -> Any:
    """(keys, parent, key) of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        below = (*keys, key) if isinstance(key, str) and key else keys
        yield below, value, key
        yield from _places(item, below)


def change_yaml(draw: Draw, text: str) -> str:
    """The YAML of flat options with one line changed, or with what YAML alone can do."""
    lines = text.splitlines()
    at = draw.below(len(lines))
    key = lines[at].partition(":")[0]
    kind = draw.below(12)
    if kind < 6:
        lines[at] = f"{key}: {json.dumps(draw.of(VALUES))}"
    elif kind == 6:
        lines.insert(at, draw.of((lines[at], "surprise: 1", "? [a, b] : c", "- x", "\t", "---", "...", "<<: {a: 1}")))
    elif kind == 7:
        lines[at] = (
            f"{key}: {draw.of(('&a [*a]', '*a', '!!python/object/apply:os.system [id]', '2026-13-45', '!!x y'))}"
        )
    elif kind == 8:
        lines[at] = f"{key}: " + draw.of(("[", "{a: ", "- ")) * draw.of((70, 5000))
    elif kind == 9:
        bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
        lines += bomb
    elif kind == 10:
        lines[at] = f"{key}: {draw.of(TEXTS)}"
    else:
        return change_bytes(draw, text.encode()).decode("latin-1")
    return "\n".join(lines) + "\n"


def change_words(draw: Draw, words: list[str], pool: Sequence[str], keep: Callable[[list[str]], bool]) -> list[str]:
    """A command line with one to three words changed; `keep` refuses those that would work for hours."""
    while True:
        out = list(words)
        for _ in range(draw.small(3)):
            at = 1 + draw.below(len(out))
            word = draw.of((draw.of(pool), str(draw.of(NUMBERS)), draw.of(TEXTS).replace("\x00", "")))
            kind = draw.below(4)
            if kind == 0:
                out.insert(at, word)
            elif kind == 1 and len(out) > 1:
                del out[min(at, len(out) - 1)]
            elif kind == 2 and at < len(out):
                out[at] = word
            elif at < len(out):
                out[at] = change_bytes(draw, out[at].encode("utf-8", "surrogateescape")).decode(
                    "utf-8", "surrogateescape"
                )
        out = [word.replace("\x00", "") for word in out]
        if keep(out):
            return out
