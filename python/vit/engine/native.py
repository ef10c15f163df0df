"""csrc/vit_engine.h through ctypes: the structs, the functions, and a failure as a Python exception.

ctypes releases the GIL during each call. Programs in C use the same functions.
"""

from __future__ import annotations

import ctypes
import itertools
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, NoReturn

from ..backends import BackendError, NativeBackend, get

PRECISIONS = {"float32": 0, "bfloat16": 1, "int8": 2}
STORED = {"int8": 3, "int4": 4}  # precisions that only weights have
POOLS = {"token": 0, "avg": 1, "": 2}
ACTIVATIONS = {"gelu": 1, "gelu_tanh": 2}
UINT8, FLOAT32 = 0, 1
LAYOUTS = {"NCHW": 0, "NHWC": 1}
LOGITS, FEATURES, TOKENS, ATTENTION = range(4)

_FILE, _UNSUPPORTED, _MEMORY, _FAILED = 2, 3, 4, 6


class Config(Structure):
    _fields_ = (
        *[(name, c_int32) for name in ("precision", "pool", "activation", "dynamic_pad", "norm_first")],
        *[
            (name, c_int64)
            for name in (
                *("channels", "image_height", "image_width", "patch_height", "patch_width", "prefix_tokens"),
                *("embed_dim", "depth", "num_heads", "mlp_width", "num_classes"),
            )
        ],
        ("norm_eps", c_double),
    )


class Images(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("pixels", c_int32),
        ("layout", c_int32),
        *[(name, c_int64) for name in ("batch", "channels", "height", "width")],
    )


class Output(Structure):
    _fields_ = (("kind", c_int32), ("block", c_int32), ("data", c_void_p), ("count", c_int64))


class Weight(Structure):
    _fields_ = (("name", c_char_p), ("data", c_void_p), ("count", c_int64), ("precision", c_int32))


class Text(Structure):
    _fields_ = (("key", c_char_p), ("value", c_char_p))


_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "create": (c_void_p, (c_char_p, c_int64)),
    "build": (c_void_p, (POINTER(Config), POINTER(Weight), c_int64, POINTER(Text), c_int64, c_int64)),
    "save": (c_int, (c_void_p, c_char_p)),
    "forward": (c_int, (c_void_p, POINTER(Images), POINTER(Output), c_int64, c_int32)),
    "destroy": (None, (c_void_p,)),
    "last_error": (c_char_p, ()),
    "last_status": (c_int, ()),
    "default_threads": (c_int32, ()),
    "get_config": (None, (c_void_p, POINTER(Config))),
    "text": (c_char_p, (c_void_p, c_char_p)),
    "memory": (None, (c_void_p, POINTER(c_int64), POINTER(c_int64))),
    "profile": (None, (c_void_p, c_int32)),
    "profile_read": (None, (c_void_p, POINTER(c_double))),
    "phase_name": (c_char_p, (c_int32,)),
}


class Library:
    """The functions of vit_engine.h without their prefix."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        for name, (result, arguments) in _FUNCTIONS.items():
            # Made from a prototype: the attributes of a CDLL would be shared with other users of the library.
            prototype = CFUNCTYPE(result, *arguments)
            setattr(self, name, prototype((f"vit_engine_{name}", library)))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@cache
def library() -> Library:
    """The engine inside the compiled CPU module; BackendError when this machine has none."""
    backend = get("cpu")
    assert isinstance(backend, NativeBackend)
    return Library(backend.lib.__file__)


@cache
def phases() -> tuple[str, ...]:
    """The names of the phases whose times an engine tells apart, in the library's order."""
    names = map(library().phase_name, itertools.count())
    return tuple(name.decode() for name in itertools.takewhile(bool, names))


def fail(status: int, text: str) -> NoReturn:
    """Raises what a vit_status stands for."""
    if status == _UNSUPPORTED:
        raise BackendError(text)
    if status == _MEMORY:
        raise MemoryError(text)
    if status == _FILE:
        raise OSError(text)
    if status == _FAILED:
        raise RuntimeError(text)
    raise ValueError(text)


def _last_error() -> str:
    return library().last_error().decode(errors="replace")  # it may quote a damaged file


def check(status: int) -> None:
    """Raises for a status that is not VIT_OK."""
    if status:
        fail(status, _last_error())


def made(handle: int | None) -> int:
    """A new engine, or what stopped it from being made."""
    if handle is None:
        fail(library().last_status(), _last_error())
    return handle
