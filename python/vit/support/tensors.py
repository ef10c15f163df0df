"""Safetensors files with checksums: a flipped bit in a tensor, its name or what is written beside it is an error.

The file's one entry of metadata, `vit`, is a CRC-32 and behind it the JSON text over which it goes: `about`, what the
writer says, and `tensors`, the CRC-32 of each over name, dtype, shape and bytes. One entry, because safetensors writes
several in any order, and equal contents are to be equal files. CRC-32 finds every single flipped bit at 1 GB/s and more
on x86-64; it is no signature.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import replacing, said, to_json
from .records import Record, parse_json
from .text import printable

KEY = "vit"


class DamagedFile(ValueError):
    """A file whose content is not what was written; the text names the file and the part that differs."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Replaces a safetensors file, with checksums; OSError when it cannot be written. about: what JSON can say."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = _apart(tensors)
    checksums = {name: _checksum(name, tensor) for name, tensor in tensors.items()}
    text = to_json({"about": dict(about or {}), "tensors": checksums})
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={KEY: f"{zlib.crc32(text.encode()):08x} {text}"})
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and str(error.strerror).startswith("vit: "):
            raise
        # safetensors has an exception of its own for a full disk; for a caller it is one of the system's.
        before = "The file before this one is unchanged" if path.exists() else "There was no file before this one"
        reason = said(error).removeprefix(f"{path}: ")
        raise OSError(f"vit: cannot write {path}: {reason}. {before}") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous (a model may be channels_last), and each with memory of its own
    (blocks may share their weights)."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        found[name] = tensor.clone() if tensor.numel() and place in seen else tensor
        seen.add(place)
    return found


def read_tensors(path: Path, required: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the writer says about a safetensors file (nothing in one without checksums) and all its tensors, on the CPU.

    Raises DamagedFile when a checksum of the file does not hold, when it has none and `required` is set, or when it is
    no safetensors file; OSError when it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY, "{")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, RuntimeError) as error:  # RuntimeError: a size that no memory can have
        raise DamagedFile(f"vit: {path} is no safetensors file, or damaged: {printable(str(error))}") from error
    if not text.startswith("{"):  # as those of files without checksums do
        return _verified(path, text, tensors), tensors
    if required:
        raise DamagedFile(f"vit: {path} has no checksums: it is damaged, or of an earlier version of vit")
    return {}, tensors


def _verified(path: Path, text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the writer says, after all checksums were found to hold."""
    checksum, _, content = text.partition(" ")
    if checksum != f"{zlib.crc32(content.encode()):08x}":
        raise DamagedFile(f"vit: {path} is damaged: its metadata is not what was written")
    record = Record(parse_json(content, f"the metadata of {path}"), f"the metadata of {path}")
    expected = record.record("tensors").values
    other = [name for name, tensor in tensors.items() if _checksum(name, tensor) != expected.get(name)]
    for problem, names in (
        ("lacks", sorted(expected.keys() - tensors.keys())),
        ("also holds", sorted(tensors.keys() - expected.keys())),
        ("holds other bits than were written of", other),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise DamagedFile(f"vit: {path} is damaged: it {problem} {', '.join(names[:5])}{more}")
    return dict(record.record("about").values)


def _checksum(name: str, tensor: Tensor) -> str:
    start = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(flat.numpy().data, start):08x}"
