"""csrc/vit_engine.h through ctypes: the structs, the functions, and a failure as a Python exception.

ctypes releases the GIL during each call. Programs in C use the same functions.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

from ..backends import BackendError, NativeBackend, get
from ..support.text import printable

#: The backend whose engine is meant where none is named.
DEFAULT = "cpu"

_STRUCTS: dict[str, type[Structure]] = {}


class Codes(Mapping[str, int]):
    """Names and values of one enum of vit_engine.h, as the compiled module has them."""

    def __init__(self, of: str) -> None:
        self.of = of

    def __getitem__(self, name: str) -> int:
        return library().codes[self.of][name]

    def __iter__(self) -> Iterator[str]:
        return iter(library().codes[self.of])

    def __len__(self) -> int:
        return len(library().codes[self.of])

    def name(self, value: int) -> str:
        """The name of a value."""
        return next(name for name, code in self.items() if code == value)


PRECISIONS = Codes("precision")
STORED = Codes("stored")  # precisions that only weights have
POOLS = Codes("pool")
ACTIVATIONS = Codes("activation")
NORMS = Codes("norm")
LAST_NORMS = Codes("last norm")
ROTARIES = Codes("rotary")
PIXELS = Codes("pixels")
LAYOUTS = Codes("layout")
OUTPUTS = Codes("output")
STATUS = Codes("status")


def _struct(name: str) -> Callable[[type[Structure]], type[Structure]]:
    """Marks the ctypes form of a struct of vit_engine.h, to be compared with it when the library is loaded."""

    def mark(kind: type[Structure]) -> type[Structure]:
        _STRUCTS[name] = kind
        return kind

    return mark


@_struct("vit_engine_config")
class Config(Structure):
    _fields_ = (
        *[
            (name, c_int32)
            for name in (
                *("precision", "pool", "activation", "dynamic_pad", "norm_first", "drop_edge", "norm", "embed_norm"),
                "pre_norm",
                *("qk_norm", "attn_norm", "mlp_norm", "gated", "rotary", "rotary_of_heads", "pool_prefix"),
                "pool_activation",
            )
        ],
        *[
            (name, c_int64)
            for name in (
                *("channels", "image_height", "image_width", "patch_height", "patch_width", "prefix_tokens"),
                *("embed_dim", "depth", "num_heads", "mlp_width", "num_classes", "pool_heads", "pool_mlp_width"),
            )
        ],
        ("norm_eps", c_double),
    )


@_struct("vit_images")
class Images(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("pixels", c_int32),
        ("layout", c_int32),
        *[(name, c_int64) for name in ("batch", "channels", "height", "width")],
    )


@_struct("vit_grid")
class Grid(Structure):
    _fields_ = (
        *[(name, c_int64) for name in ("height", "width")],
        ("positions", c_void_p),
        ("num_positions", c_int64),
        ("rotary", c_void_p),
        ("num_rotary", c_int64),
    )


@_struct("vit_output")
class Output(Structure):
    _fields_ = (("kind", c_int32), ("block", c_int32), ("data", c_void_p), ("count", c_int64))


@_struct("vit_tensor")
class Weight(Structure):
    _fields_ = (("name", c_char_p), ("data", c_void_p), ("count", c_int64), ("precision", c_int32))


@_struct("vit_text")
class Text(Structure):
    _fields_ = (("key", c_char_p), ("value", c_char_p))


class _Name(Structure):
    _fields_ = (("of", c_char_p), ("name", c_char_p), ("value", c_int64))


_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "create": (c_void_p, (c_char_p, c_int64)),
    "map": (c_void_p, (c_char_p, c_int64)),
    "build": (c_void_p, (POINTER(Config), POINTER(Weight), c_int64, POINTER(Text), c_int64, c_int64)),
    "save": (c_int, (c_void_p, c_char_p)),
    "forward": (c_int, (c_void_p, POINTER(Images), POINTER(Output), c_int64, c_int32)),
    "forward_grid": (c_int, (c_void_p, POINTER(Images), POINTER(Grid), POINTER(Output), c_int64, c_int32)),
    "destroy": (None, (c_void_p,)),
    "last_error": (c_char_p, ()),
    "last_status": (c_int, ()),
    "default_threads": (c_int32, ()),
    "get_config": (c_int, (c_void_p, POINTER(Config))),
    "text": (c_char_p, (c_void_p, c_char_p)),
    "memory": (c_int, (c_void_p, POINTER(c_int64), POINTER(c_int64))),
    "profile": (c_int, (c_void_p, c_int32)),
    "profile_read": (c_int, (c_void_p, POINTER(c_double))),
    "phase_name": (c_char_p, (c_int32,)),
    "name": (c_int, (c_int32, POINTER(_Name))),
}


class Library:
    """The functions of vit_engine.h without their prefix, and `codes`, the values of its enums by name."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        for name, (result, arguments) in _FUNCTIONS.items():
            # Made from a prototype: the attributes of a CDLL would be shared with other users of the library.
            prototype = CFUNCTYPE(result, *arguments)
            setattr(self, name, prototype((f"vit_engine_{name}", library)))
        self.codes: dict[str, dict[str, int]] = {}
        found = _Name()
        for index in itertools.count():
            if self.name(index, found):
                break
            self.codes.setdefault(found.of.decode(), {})[found.name.decode()] = found.value
        for struct, kind in _STRUCTS.items():
            if self.codes.pop(struct) != {field[0]: getattr(kind, field[0]).offset for field in kind._fields_}:
                raise BackendError(f"vit: {struct} of {path} has other fields than this vit: reinstall vit-kernels")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def check(self, status: int) -> None:
        """Raises for a status that is not VIT_OK."""
        if status:
            raise self._failure(status)

    def made(self, handle: int | None) -> int:
        """A new engine, or what stopped it from being made."""
        if handle is None:
            raise self._failure(self.last_status())
        return handle

    def phases(self) -> tuple[str, ...]:
        """The names of the phases whose times an engine tells apart, in the library's order."""
        names = map(self.phase_name, itertools.count())
        return tuple(name.decode() for name in itertools.takewhile(bool, names))

    def _failure(self, status: int) -> Exception:
        """What a vit_status that is not VIT_OK stands for."""
        kinds = {"unsupported": BackendError, "memory": MemoryError, "file": OSError, "failed": RuntimeError}
        kind = kinds.get(STATUS.name(status), ValueError)
        return kind(printable(self.last_error().decode(errors="replace")))  # it may quote a damaged file


@cache
def library(backend: str = DEFAULT) -> Library:
    """The engine inside a backend's compiled module; BackendError when this machine has none."""
    found = get(backend)
    if not isinstance(found, NativeBackend):
        raise BackendError(f"vit: backend '{backend}' has no engine; there is one in '{DEFAULT}'")
    try:
        return Library(found.lib.__file__)
    except AttributeError as error:
        raise BackendError(
            f"vit: the compiled module of backend '{backend}' lacks a part of the engine ({error}): "
            f"it has none, or is of another version; reinstall vit-kernels. There is an engine in '{DEFAULT}'"
        ) from error


def file_name(path: str | os.PathLike[str]) -> bytes:
    """The path as the system takes it; ValueError for one that it cannot have.

    A null character would end it early; half of a UTF-16 pair stands for no byte of a name.
    """
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError(f"vit.Engine: the path {os.fspath(path)!r} cannot be the name of a file") from None
    if b"\0" in name:
        raise ValueError(f"vit.Engine: the path {os.fspath(path)!r} holds a null character")
    return name


def count(name: str, value: int | None, bits: int) -> int:
    """An argument of so many bits, 0 for None. ctypes would cut a larger one: 2^64 + 5 became 5 without a word."""
    if value is None:
        return 0
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"vit.Engine: {name} must be a whole number or None, got {value!r}") from None
    if number < 1:
        raise ValueError(f"vit.Engine: {name} must be positive or None, got {number}")
    if number >= 2**bits:
        raise ValueError(f"vit.Engine: {name} must be below 2^{bits}, got {number}")
    return number
