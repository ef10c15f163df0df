"""NumPy's .npz archives: every member's header is checked against the archive before its values are read."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from ..support.text import printable
from .checkpoint import WeightsError, some

#: Trained weights hardly compress; a head of zeros does, a thousandfold. Beyond this an archive is a bomb.
MOST_UNPACKED = 64 << 20
MOST_TIMES_THE_FILE = 4

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0, (3, 0): npy.read_array_header_2_0}


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive.

    Raises WeightsError for Python objects, for a name that stands twice, and
    for members that are larger than their own header or than the file can mean.
    """
    source = f"weights {str(path)!r}"
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename.removesuffix(".npy") for member in members]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise WeightsError(f"vit: {source}: {printable(some(twice, 3))} stand more than once")
        if other := [member.filename for member in members if not member.filename.endswith(".npy")]:
            raise WeightsError(f"vit: {source}: {printable(some(other, 3))} are no arrays (.npy)")
        size, unpacked = path.stat().st_size, sum(member.file_size for member in members)
        if unpacked > max(MOST_UNPACKED, MOST_TIMES_THE_FILE * size):
            raise WeightsError(
                f"vit: {source}: its {size} bytes unpack to {unpacked}, at most {MOST_TIMES_THE_FILE} times as many "
                "are read: no trained weights compress so well. Write them uncompressed (numpy.savez)"
            )
        for member, name in zip(members, names, strict=True):
            with archive.open(member) as stream:
                _check_header(stream, member, name, source)
        found = {}
        for member, name in zip(members, names, strict=True):
            with archive.open(member) as stream:
                found[name] = npy.read_array(stream, allow_pickle=False)
        return found


def _check_header(stream: IO[bytes], member: zipfile.ZipInfo, name: str, source: str) -> None:
    version: Any = npy.read_magic(stream)
    if version not in _HEADERS:
        raise WeightsError(f"vit: {source}: {printable(name)} has the unknown .npy version {version}")
    shape, _, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise WeightsError(f"vit: {source}: {printable(name)} holds Python objects, which are not loaded")
    data = member.file_size - stream.tell()
    if math.prod(shape) * dtype.itemsize != data:
        raise WeightsError(
            f"vit: {source}: {printable(name)} says {list(shape)} of {dtype.name} and has {data} bytes of data"
        )
