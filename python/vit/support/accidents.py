"""What a file is that is not what its name says, for the usual accidents of downloads."""

from __future__ import annotations

LOOKED_AT = 64  # bytes of its beginning


def instead(start: bytes) -> str | None:
    """In words, by the first LOOKED_AT bytes; None where they tell nothing."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, such as an error or a login in the place of the download"
    if text.startswith((b"{", b"[")) and text.isascii() and b"\0" not in text:
        return "it is JSON, such as a server's answer in the place of the download"
    if start.startswith(b"\x1f\x8b"):
        return "it is compressed by gzip; unpack it"
    return "it is an HDF5 file, as Keras writes" if start.startswith(b"\x89HDF") else None
