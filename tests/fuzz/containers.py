"""Changes inside containers: the header of safetensors files, the members of zip archives, pickles with calls."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import zipfile
import zlib
from typing import Any

from .mutate import NUMBERS, TEXTS, Draw, change_bytes, change_json


def change_safetensors(draw: Draw, data: bytes) -> bytes:
    """A safetensors file with its header changed: tensors, shapes, offsets, types, texts; or its data."""
    end = 8 + int.from_bytes(data[:8], "little")
    header, body = data[8:end].decode(), data[end:]
    kind = draw.below(8)
    if kind == 0:
        return change_bytes(draw, data)
    if kind == 1:
        return data[:8] + data[8:end] + change_bytes(draw, body)
    if kind == 2:
        return (draw.of(NUMBERS) % 2**64).to_bytes(8, "little") + data[8:]
    if kind == 3:
        return safetensors_of(change_json(draw, header)[0], body)
    tensors = json.loads(header)
    names = [name for name in tensors if name != "__metadata__"]
    name, other = draw.of(names), draw.of(names)
    record: dict[str, Any] = tensors[name]
    if kind == 4:
        record["dtype"] = draw.of(
            ("F64", "F32", "F16", "BF16", "I8", "U8", "I32", "I64", "BOOL", "F8_E4M3", "C64", "x")
        )
        if draw.chance(0.5):  # with a shape that fits the bytes
            sizes = {"F64": 8, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I64": 8, "BOOL": 1, "F8_E4M3": 1, "C64": 8}
            first, last = record["data_offsets"]
            record["shape"] = [(last - first) // sizes.get(record["dtype"], 4)]
    elif kind == 5:
        record["shape"] = draw.of(([], [0], [-1], record["shape"][::-1], [1, *record["shape"]], [draw.of(NUMBERS)] * 3))
    elif kind == 6:
        first, last = record["data_offsets"]
        record["data_offsets"] = draw.of(
            ([last, first], [first, draw.of(NUMBERS)], tensors[other]["data_offsets"], [first + 4, last + 4])
        )
    else:
        tensors[draw.of((f"module.{name}", f"x.{name}", name.upper(), "head.weight", other))] = tensors.pop(name)
    return safetensors_of(json.dumps(tensors), body)


def safetensors_of(header: str, body: bytes) -> bytes:
    """The file of a header and its data."""
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def change_zip(draw: Draw, data: bytes) -> bytes:
    """A zip archive with one member changed, doubled, left out, renamed, compressed, or made to lie about its size."""
    kind = draw.below(9)
    if kind == 0:
        return change_bytes(draw, data)
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(item.filename, old.read(item)) for item in old.infolist()]
    at = draw.below(len(members))
    name, content = members[at]
    method = zipfile.ZIP_STORED
    if kind in (1, 2):
        members[at] = name, change_bytes(draw, content)
    elif kind == 3:
        del members[at]
    elif kind == 4:
        members.append((name, change_bytes(draw, content)))
    elif kind == 5:
        members[at] = draw.of((f"../{name}", f"/{name}", name.upper(), "x", "", "a" * 5000)), content
    elif kind == 6:
        method = draw.of((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif kind == 7:
        members.append((draw.of(("x.npy", "archive/x", name)), b"\x00" * draw.of((1 << 20, 64 << 20))))
        method = zipfile.ZIP_DEFLATED
    out = zip_of(members, method)
    if kind == 8:  # of the central directory: sizes, offsets, counts
        start = out.rindex(b"PK\x01\x02")
        return out[:start] + change_bytes(draw, out[start:])
    return out


def zip_of(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """The archive; names may stand twice."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name or "x", (2000, 1, 1, 0, 0, 0))
            info.compress_type = method
            archive.NameToInfo.pop(info.filename, None)  # without its warning
            archive.writestr(info, content)
    return file.getvalue()


class _Call:
    """Pickles as a call of any function."""

    def __init__(self, function: str, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        module, _, name = self.function.rpartition(".")
        return getattr(__import__(module, fromlist=[name]), name), self.arguments


CALLS = (
    _Call("os.system", "gs fuzz"),
    _Call("subprocess.check_output", ["gs", "fuzz"]),
    _Call("builtins.exec", "import os; os.system('gs fuzz')"),
    _Call("builtins.eval", "__import__('os').system('gs fuzz')"),
    _Call("builtins.getattr", "x", "upper"),
    _Call("builtins.print", "x"),
    _Call("os.mkdir", "made-by-a-pickle"),
    _Call("os.getcwd"),
)


def change_pickle(draw: Draw, data: bytes) -> bytes:
    """A .pt file with its pickle changed, or with one that calls a function."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return pickle.dumps(draw.of(CALLS), 2) + data if draw.chance(0.2) else change_bytes(draw, data)
    if draw.chance(0.5):
        return change_zip(draw, data)
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(item.filename, old.read(item)) for item in old.infolist()]
    at = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    name, content = members[at]
    if draw.chance(0.3):
        new = pickle.dumps(draw.of(CALLS), 2)
        # before the true content: a dict of both
        members[at] = name, draw.of((new, new[:-1] + b"0" + content[2:]))
    else:
        members[at] = name, change_bytes(draw, content)
    return zip_of(members)


def change_png(draw: Draw, data: bytes) -> bytes:
    """A PNG with one chunk changed, doubled or left out, and the checksums of all made anew."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    place = draw.below(len(chunks))
    kind, content = chunks[place]
    what = draw.below(5)
    if what == 0:
        del chunks[place]
    elif what == 1:
        chunks.insert(place, (kind, content))
    elif what == 2 and chunks[0][0] == b"IHDR":
        width, height = (draw.of((0, 1, 2, 7, 300, 5000, 60000, 2**31 - 1)) for _ in range(2))
        chunks[0] = b"IHDR", struct.pack(">II", width, height) + chunks[0][1][8:]
    else:
        chunks[place] = kind, change_bytes(draw, content)
    out = data[:8]
    for kind, content in chunks:
        out += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return out


def change_engine(draw: Draw, data: bytes) -> tuple[bytes, bool]:
    """An engine file changed as safetensors, and whether its checksums were made anew, as a forger would.

    Every second one is: a checksum keeps all others from getting further than that.
    """
    if draw.chance(0.4):
        return forge_engine(draw, data), True
    out = change_safetensors(draw, data)
    end = 8 + int.from_bytes(out[:8], "little")
    if draw.chance(0.2) or out[8:9] != b"{" or end > len(out):
        return out, False
    return signed(out[8:end]) + out[end:], True


def forge_engine(draw: Draw, data: bytes) -> bytes:
    """An engine file with one text of its header or the bytes of one tensor changed, and sound checksums."""
    end = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:end]), data[end:]
    texts: dict[str, str] = header["__metadata__"]
    if draw.chance(0.5):
        places = sorted(tuple(record["data_offsets"]) for name, record in header.items() if name != "__metadata__")
        sums = texts["crc32c"].split()
        which = draw.below(len(places))
        first, last = places[which]
        part = bytearray(body[first:last])
        for _ in range(draw.small(4)):
            part[draw.below(len(part))] = draw.of((0, 0x7F, 0x80, 0xFF, draw.below(256)))
        body = body[:first] + bytes(part) + body[last:]
        sums[which] = f"{crc32c(part):08x}"
        texts["crc32c"] = " ".join(sums)
    else:
        key = draw.of([key for key in texts if not key.startswith("crc32c")])
        texts[key] = draw.of((draw.of(TEXTS), str(draw.of(NUMBERS)), str(draw.below(5)), change_text(draw, texts[key])))
    return signed(json.dumps(header).encode("utf-8", "surrogatepass")) + body


def change_text(draw: Draw, text: str) -> str:
    """JSON changed as such, other texts as bytes."""
    if text[:1] in ("[", "{"):
        return change_json(draw, text)[0]
    return change_bytes(draw, text.encode()).decode("latin-1")


def signed(text: bytes) -> bytes:
    """The header of an engine file with this JSON, its checksum made anew."""
    # Spelt as the engine spells it: the checksum is looked for in the text.
    text = text.rstrip().replace(b'"crc32c header": "', b'"crc32c header":"')
    text += b" " * (-(8 + len(text)) % 64)
    header = len(text).to_bytes(8, "little") + re.sub(rb'("crc32c header": ?")[0-9a-f]{8}', rb"\g<1>00000000", text)
    return re.sub(rb'("crc32c header": ?")0{8}', rb"\g<1>%08x" % crc32c(header), header)


def crc32c(data: bytes | bytearray) -> int:
    """CRC-32C (Castagnoli), the checksum of engine files."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _entry(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


_TABLE = [_entry(byte) for byte in range(256)]
