"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as published: the "python version" and the "binary version".

python version: files data_batch_1 ... test_batch, or train and test; each a pickle, which is read without running
anything of it. binary version: data_batch_1.bin ... test_batch.bin with records of 1 + 3072 bytes, or train.bin and
test.bin with 2 + 3072 (coarse label, fine label). An image is 32 x 32, stored as three planes.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...support.text import printable
from ..format import Format, Request, names_in, path_of
from ..labels import by_names
from ..samples import DataError, Samples, Source

PIXELS = 3 * 32 * 32
MAX_BYTES = 1 << 30  # CIFAR-100's train file, the largest one published, has 155 MB

_TRAIN, _TEST = re.compile(r"data_batch_\d+|train"), ("test_batch", "test")
_FOLDERS = ("cifar-10-batches-py", "cifar-100-python", "cifar-10-batches-bin", "cifar-100-binary")


def _home(data: str) -> Path | None:
    """The folder of the files: `data` or the one that the published archive unpacks into it."""
    path = path_of(data)
    for folder in (path, *(path / name for name in _FOLDERS)):
        names = set(names_in(str(folder)))
        python = names & {"batches.meta", "meta"} and names & {"data_batch_1", "train", *_TEST}
        if python or names & {"batches.meta.txt", "fine_label_names.txt"}:
            return folder
    return None


def cifar(folder: Path, request: Request) -> Source:
    """The data set in a folder of CIFAR's files."""
    binary = any(path.suffix == ".bin" for path in folder.iterdir())
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix == (".bin" if binary else "")]
    read = _read_binary if binary else _read_pickled
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "test": []}
    for path in paths:
        if _TRAIN.fullmatch(path.stem):
            parts["train"].append(read(path))
        elif path.stem in _TEST:
            parts["test"].append(read(path))
    splits = {}
    for split, found in parts.items():
        if found:
            images, labels = (np.concatenate(column) for column in zip(*found, strict=True))
            splits[split] = Samples(images, labels, [f"{split}-{i}" for i in range(len(labels))])
    if not splits:
        raise DataError(f"vit: {folder} has the class names of CIFAR, but no data_batch_1, train, test_batch or test")
    return by_names(folder.name, "cifar", splits, _class_names(folder, binary), folder, request)


def _class_names(folder: Path, binary: bool) -> list[str]:
    if binary:
        path = next(p for name in ("batches.meta.txt", "fine_label_names.txt") if (p := folder / name).is_file())
        return path.read_text(encoding="utf-8").split()
    path = next(p for name in ("batches.meta", "meta") if (p := folder / name).is_file())
    values = _unpickled(path)
    names = values.get("label_names", values.get("fine_label_names"))
    if isinstance(names, list):
        names = [_text(name) if isinstance(name, bytes) else name for name in names]  # as Python 3 writes them
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"vit: {path} has no list of label_names or fine_label_names")
    return names


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    head = 1 if (path.parent / "batches.meta.txt").is_file() else 2
    data = np.fromfile(path, dtype=np.uint8)
    if not len(data) or len(data) % (head + PIXELS):
        raise DataError(
            f"vit: {path} has {len(data)} bytes, which are no whole number of records of {head} + {PIXELS} bytes"
        )
    records = data.reshape(-1, head + PIXELS)
    return _upright(records[:, head:]), records[:, head - 1].astype(np.int64)


def _read_pickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    values = _unpickled(path)
    data, labels = values.get("data"), values.get("fine_labels", values.get("labels"))
    if not isinstance(data, _Array) or data.content is None:
        raise DataError(f"vit: {path} has no array of images under data")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"vit: {path} has no list of numbers under labels or fine_labels")
    if data.shape != (len(labels), PIXELS) or len(data.content) != len(labels) * PIXELS or not labels:
        raise DataError(
            f"vit: {path} has images {' x '.join(map(str, data.shape))} in {len(data.content)} bytes and {len(labels)} "
            f"labels; expected is n x {PIXELS} of uint8 and n labels"
        )
    if not all(-(2**31) <= label < 2**31 for label in labels):
        raise DataError(f"vit: {path} has the label {max(labels, key=abs)}")
    order: Any = "F" if data.fortran else "C"
    flat = np.frombuffer(data.content, dtype=np.uint8).reshape(data.shape, order=order)
    return _upright(flat), np.array(labels, dtype=np.int64)


def _upright(flat: np.ndarray) -> np.ndarray:
    """[n, 3072], plane after plane -> [n, 32, 32, 3]."""
    return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


# ---- pickles, of which nothing is run ----


class _Array:
    """Stands for numpy.ndarray: takes what a pickled one would be made of."""

    shape: tuple[int, ...] = ()
    content: bytes | None = None
    fortran = False

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[1], tuple):
            raise pickle.UnpicklingError("an array of unknown make")
        _, self.shape, kind, self.fortran, content = state
        if getattr(kind, "name", None) not in ("u1", "|u1") or not isinstance(content, (bytes, str)):
            raise pickle.UnpicklingError(f"an array of {getattr(kind, 'name', kind)!r}, not of uint8")
        self.content = content.encode("latin1") if isinstance(content, str) else content


class _Kind:
    """Stands for numpy.dtype: keeps its name."""

    def __init__(self, name: Any = None, *rest: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields: uint8 has none."""


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """Stands for _codecs.encode, which is how Python 3 writes bytes into pickles that Python 2 reads."""
    if not isinstance(text, str):
        raise pickle.UnpicklingError("bytes of unknown make")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encoded,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *rest: _Array() for core in ("core", "_core")},
}


class _Unpickler(pickle._Unpickler):
    """Makes lists, dicts, texts, numbers and the stand-ins above. (The one in Python: the one in C allocates whatever
    an index in the file asks for.)"""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR does")
        return _KNOWN[module, name]


def _unpickled(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > MAX_BYTES:
        raise DataError(f"vit: {path} has {size:,} bytes, more than any file of CIFAR")
    try:
        with open(path, "rb") as file:
            values = _Unpickler(file, encoding="latin1").load()
    except Exception as error:  # damaged pickles raise whatever their opcodes come to
        raise DataError(f"vit: {path} is no file of CIFAR, or damaged: {printable(str(error))[:200]}") from error
    if not isinstance(values, Mapping):
        raise DataError(f"vit: {path} is no file of CIFAR: it holds a {type(values).__name__}")
    return {_text(key): value for key, value in values.items()}


def _text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


FORMAT = Format(
    about="a folder with the files of CIFAR-10 or CIFAR-100 (python or binary version)",
    recognizes=lambda data: _home(data) is not None,
    open=lambda data, request: cifar(_home(data) or path_of(data), request),
    recipe=lambda data: "cifar",
    rank=20,
)
