"""The compiled module called by itself: whatever numbers it gets, it answers or refuses by name, and lives on."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import NATIVE
from vit.backends._host import HostBackend

#: Fields that are a pointer and strides, and how many of those.
STRIDED = {
    "matmul": dict.fromkeys(("a", "b"), 3),
    "rotary": dict.fromkeys(("x", "y", "dy", "dx", "table"), 3),
    "attention": dict.fromkeys(("q", "k", "v", "dq", "dk", "dv"), 3),
    "attention_rows": dict.fromkeys(("q", "k", "rows"), 3),
    "move": dict.fromkeys(("a", "lead", "b"), 6),
}
SIZES = ("M", "N", "K", "L", "R", "C", "B", "H", "D", "n", "batch", "prefix", "leads", "terms", "table_B", "table_H")
CODES = ("dtype", "param_dtype", "out_dtype", "activation", "pairing")
PLENTY = 2**62  # bytes of a workspace, which is nowhere


def numbers(module: Any, function: str, **given: int) -> list[Any]:
    """A call with null pointers, sizes of 0, float32 and one thread, but for what is given by the name of its field."""
    op = function.removesuffix("_fwd").removesuffix("_bwd")
    strided = STRIDED.get(op, {})
    values: list[Any] = []
    for field in module.fields[function]:
        value = given.get(field, 0)
        if field == "context":
            values += [0, 0, given.get("num_threads", 1), False]
        elif field == "workspace":
            values += [0, PLENTY]
        elif field == "sizes":
            values += [value] * 6
        elif field in ("eps", "divisor") or (field == "scale" and op in ("attention", "attention_rows")):
            values.append(float(given.get(field, 1)))
        elif field == "activation":
            values.append(given.get(field, 1))
        else:
            values += [value] + [1] * strided.get(field, 0)
    return values


def call(module: Any, function: str, **given: int) -> Any:
    return getattr(module, function)(*numbers(module, function, **given))


@pytest.fixture
def module(backend: str) -> Any:
    if not isinstance(NATIVE[backend], HostBackend):
        pytest.skip("only kernels in this process can end it")
    return NATIVE[backend].lib


def test_nothing_of_no_size_is_done(module):
    for function in module.fields:
        assert call(module, function) is None, function


def test_sizes_below_0_are_refused_by_name(module):
    for function, fields in module.fields.items():
        for field in (f for f in fields if f in (*SIZES, "sizes")):
            for size in (-1, -(2**62)):
                with pytest.raises(RuntimeError, match=rf"^{function}: {field} is {size}; "):
                    call(module, function, **{field: size})


def test_codes_that_are_none_are_refused_by_name(module):
    for function, fields in module.fields.items():
        for field in (f for f in fields if f in CODES):
            for code in (-1, 99, 2**31 - 1):
                with pytest.raises(RuntimeError, match=rf"^{function}: {field} is .*{code}; "):
                    call(module, function, **{field: code})
        with pytest.raises(RuntimeError, match=r"dtype is float16; the .* backend takes float32, float64 and bfloat16"):
            call(module, function, dtype=3)


def test_fewer_threads_than_one_are_refused(module):
    for function in module.fields:
        sizes = {field: 2 for field in module.fields[function] if field in SIZES}
        for threads in (0, -1, -(2**31)):
            with pytest.raises(RuntimeError, match=rf"^{function}: num_threads is {threads}; at least 1 is needed"):
                call(module, function, **sizes, num_threads=threads)


def test_null_pointers_are_refused_by_name(module):
    for function, fields in module.fields.items():
        sizes = {field: 2 for field in fields if field in (*SIZES, "sizes")} | {"prefix": 0, "leads": 0}
        with pytest.raises(RuntimeError, match=rf"^{function}: \w+.* is null"):
            call(module, function, **sizes)


def test_what_does_not_fit_together_is_refused(module):
    for direction in ("fwd", "bwd"):
        with pytest.raises(RuntimeError, match=rf"^rotary_{direction}: D is 3; pairs need an even one"):
            call(module, f"rotary_{direction}", D=3)
        with pytest.raises(RuntimeError, match=rf"^rotary_{direction}: prefix is 9; there are 4 tokens"):
            call(module, f"rotary_{direction}", N=4, prefix=9)
    with pytest.raises(RuntimeError, match=r"^rotary_bwd: table_H is 5; allowed are 1 and H, 2"):
        call(module, "rotary_bwd", H=2, table_B=1, table_H=5)
    with pytest.raises(RuntimeError, match=r"^move: leads is 4; dimension 1 has 3"):
        call(module, "move", sizes=3, leads=4)
    if "attention_rows" in module.fields:
        with pytest.raises(RuntimeError, match=r"^attention_rows: R is 3; without queries it is at most N, 2"):
            call(module, "attention_rows", N=2, R=3)
    if "linear_int8" in module.fields:
        with pytest.raises(RuntimeError, match=r"^linear_int8: K is 131073; at most 131072 products of bytes fit"):
            call(module, "linear_int8", K=131073)
        with pytest.raises(RuntimeError, match=r"^linear_int8: dtype is float64; allowed are float32, bfloat16 and"):
            call(module, "linear_int8", dtype=1)


def test_one_size_of_0_beside_others_ends_nothing(module):
    """Without pointers: an answer where nothing is to be done, else a refusal."""
    for function, fields in module.fields.items():
        sizes = [field for field in fields if field in SIZES]
        for empty in sizes:
            given = dict.fromkeys(sizes, 4) | {empty: 0}
            try:
                assert call(module, function, **given) is None
            except RuntimeError as error:
                assert str(error).startswith(f"{function}: ")  # noqa: PT017
