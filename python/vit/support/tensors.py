"""Safetensors files with checksums: a flipped bit in a tensor, its name or what is written beside it is an error.

Two entries of the file's metadata hold them. `vit.checksums` is a JSON object of tensor names and CRC-32s, each over
name, dtype, shape and bytes; `vit.checksum` is the CRC-32 of all other metadata, `vit.checksums` among them. CRC-32
finds every single flipped bit and takes a tenth of a second for ViT-B (1 GB/s and more on x86-64); it is no signature.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .files import replacing, to_json
from .records import RecordError, parse_json

CHECKSUMS, CHECKSUM = "vit.checksums", "vit.checksum"


class DamagedFile(ValueError):
    """A file whose content is not what was written; the text names the file and the part that differs."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Replaces a safetensors file, with checksums; OSError when it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = dict(metadata or {})
    about[CHECKSUMS] = to_json({name: _checksum(name, tensor) for name, tensor in tensors.items()})
    about[CHECKSUM] = _metadata_checksum(about)
    try:
        with replacing(path) as temporary:
            save_file(dict(tensors), temporary, metadata=about)
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and str(error.strerror).startswith("vit: "):
            raise
        # safetensors has an exception of its own for a full disk; for a caller it is one of the system's.
        before = "The file before this one is unchanged" if path.exists() else "There was no file before this one"
        raise OSError(f"vit: cannot write {path}: {error}. {before}") from error


def read_tensors(path: Path, required: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata (the checksums among it) and all tensors of a safetensors file, on the CPU.

    Raises DamagedFile when a checksum of the file does not hold, when it has none and `required` is set, or when it is
    no safetensors file; OSError when it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, RuntimeError) as error:  # RuntimeError: a size that no memory can have
        raise DamagedFile(f"vit: {path} is no safetensors file, or damaged: {error}") from error
    if CHECKSUMS in about or CHECKSUM in about:  # one flipped bit spoils one name only
        _verify(path, about, tensors)
    elif required:
        raise DamagedFile(f"vit: {path} has no checksums: it is damaged, or of an earlier version of vit")
    return about, tensors


def _verify(path: Path, about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    if about.get(CHECKSUM) != _metadata_checksum(about):
        raise DamagedFile(f"vit: {path} is damaged: its metadata is not what was written")
    try:
        expected = parse_json(about.get(CHECKSUMS, ""), f"the checksums of {path}")
    except RecordError as error:
        raise DamagedFile(f"vit: {path} is damaged: {error}") from error
    other = [name for name, tensor in tensors.items() if _checksum(name, tensor) != expected.get(name)]
    for problem, names in (
        ("lacks", sorted(expected.keys() - tensors.keys())),
        ("also holds", sorted(tensors.keys() - expected.keys())),
        ("holds other bits than were written of", other),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise DamagedFile(f"vit: {path} is damaged: it {problem} {', '.join(names[:5])}{more}")


def _checksum(name: str, tensor: Tensor) -> str:
    start = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(flat.numpy().data, start):08x}"


def _metadata_checksum(about: Mapping[str, str]) -> str:
    rest = sorted((key, value) for key, value in about.items() if key != CHECKSUM)
    return f"{zlib.crc32(to_json(rest).encode()):08x}"
