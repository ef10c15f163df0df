"""The one door for pictures: which formats, which way up, on which ground, with how much memory."""

from __future__ import annotations

import ast
import io
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import vit
from PIL import Image, ImageFile
from vit.data import DataError
from vit.data.folder import folder
from vit.data.samples import read_image
from vit.preprocess import INTERPOLATIONS, Preprocess
from vit.support import images, whole
from vit.support.images import EXTENSIONS, FORMATS, ImageError, open_image
from vit.support.resample import resized_window

PACKAGE = Path(vit.__file__).parent
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print showpage\n"


def picture(width: int = 24, height: int = 16) -> Image.Image:
    """Every corner another colour, so that a turn shows."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x > y) * 200], 2).astype(np.uint8), "RGB")


def png(width: int, height: int, grey: int = 77, mode: int = 0) -> bytes:
    """A PNG of one grey, written without its pixels in memory: its header says the size, its data are zeros."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    line = b"\0" + bytes([grey]) * width
    data = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def header_of(width: int, height: int) -> bytes:
    """A PNG that says this size and has a few pixels only."""
    data = bytearray(png(10, 10))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def peak(code: str, *arguments: str) -> int:
    """The most memory, in MiB, that a process takes for the code, beyond what it takes for `pass`."""
    head = (
        "import resource, sys; from pathlib import Path; from vit.preprocess import Preprocess; "
        "from vit.data.samples import read_image; from vit.data.folder import folder; "
        "m = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; a = m()\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", f"{head}{code}\nprint((m() - a) // 1024)", *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(out.stdout.split()[-1])


# ---- which files ----


def test_only_the_one_door_opens_images() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node.value).endswith("Image"):
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found == {"support/images.py"}


@pytest.mark.parametrize("suffix", sorted(EXTENSIONS))
def test_every_extension_is_of_a_format_that_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    image = picture().convert("L") if suffix == ".pgm" else picture()
    image.save(path)
    assert read_image(path).size == (24, 16)
    other = tmp_path / "of-another-name.png"
    other.write_bytes(path.read_bytes())
    assert read_image(other).size == (24, 16), "the content decides"


def test_an_image_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "started"
    for name in ("gs", "gswin64c", "djpeg", "convert"):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\necho $0 $* >> {log}\necho 9.50\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        picture().save(tmp_path / "data" / name / "good.png")
        (tmp_path / "data" / name / "eps.png").write_bytes(EPS)
    with pytest.raises(DataError, match=r"eps\.png: not an image, or none of BMP, GIF, JPEG"):
        read_image(tmp_path / "data" / "a" / "eps.png")
    for validate in ("decode", "header"):
        assert len(folder(tmp_path / "data", validate=validate).skipped) == 2
    assert not log.exists()


@pytest.mark.parametrize("name", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "PSD", "MSP"])
def test_other_formats_are_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.png"
    if name == "PSD":
        path.write_bytes(b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(60))
    else:
        image = picture().convert("1") if name == "MSP" else picture()
        image.save(path, format=name)
    with pytest.raises(DataError, match=f"none of {', '.join(FORMATS)}"):
        read_image(path)


def test_what_is_no_file_is_named_and_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    began = time.monotonic()
    for name, text in (("fifo", "is a pipe, not a file"), ("folder", "is a folder"), ("zero", "is a device, not a")):
        with pytest.raises(DataError, match=rf"{name}\.png: {text}"):
            read_image(tmp_path / f"{name}.png")
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        picture().save(tmp_path / "data" / name / "good.png")
    os.mkfifo(tmp_path / "data" / "a" / "fifo.png")
    assert [item.reason for item in folder(tmp_path / "data").skipped] == ["is a pipe, not a file"]
    assert time.monotonic() - began < 20


def test_damaged_files_of_every_format_are_errors_that_name_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = []
    for name in FORMATS:
        whole = io.BytesIO()
        picture(60, 50).save(whole, name)
        data = whole.getvalue()
        for _ in range(60):
            broken = bytearray(data)
            for place in rng.integers(0, len(data), 8):
                broken[place] = rng.integers(256)
            path = tmp_path / "broken.png"
            path.write_bytes(broken[: rng.integers(len(data))] if rng.random() < 0.5 else broken)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read_image(path)
            except DataError as error:
                texts.append(str(error))
    assert len(texts) > 60
    for text in texts:
        assert text.startswith(f"vit: cannot read image {path}: ")
        assert "\n" not in text


def test_texts_of_a_file_are_printed_escaped(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31mred\n.png"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"\\x1b\[31mred\\n\.png: the file is empty"):
        read_image(path)


# ---- which way up ----


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_as_its_orientation_says(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = picture(32, 16)
    # How the camera stored it: the turn that undoes the orientation.
    method = {6: 8, 8: 6}.get(orientation, orientation)
    stored = upright.transpose(images._TURNS[method]) if method > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"phone{suffix}"
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    stored.save(path, exif=exif, **options)
    atol = 3 if suffix == ".jpg" else 0  # of 255 levels: what JPEG of quality 100 takes from this picture
    assert np.abs(np.asarray(read_image(path)).astype(int) - np.asarray(upright)).max() <= atol
    transform = Preprocess((16, 16))
    with Image.open(path) as opened:
        direct = transform(opened)
    assert torch.equal(direct, transform(read_image(path))), "model.preprocess turns once, not twice"
    assert (direct - transform(upright)).abs().max() <= atol * 2.0 / 255


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_none(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    picture().save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png")), np.asarray(picture()))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_leaves_the_picture(tmp_path: Path) -> None:
    for exif in (
        b"Exif\0\0",
        b"Exif\0\0garbage!",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
    ):
        picture().save(tmp_path / "x.jpg", exif=exif)
        assert read_image(tmp_path / "x.jpg").size == (24, 16)


# ---- on which ground ----


def inked() -> Image.Image:
    """Black ink on a transparent black ground: all that differs is the transparency."""
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (5, 5, 15, 15))
    return image


def tinted(mode: str) -> Image.Image:
    image = inked()
    if mode == "P":  # with one transparent entry, as in a GIF
        palette = Image.new("P", image.size, 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(1, (5, 5, 15, 15))
        palette.info["transparency"] = 0
        return palette
    if mode == "P bytes":  # with an opacity per entry, as in a PNG
        palette = tinted("P")
        palette.info["transparency"] = bytes([0, 255])
        return palette
    if mode in ("L", "RGB"):  # with a colour that means transparent
        grey = Image.new(mode, image.size, "white")
        grey.paste("black", (5, 5, 15, 15))
        grey.info["transparency"] = 255 if mode == "L" else (255, 255, 255)
        return grey
    if mode == "1":
        return tinted("L").convert("1")
    return image.convert("LA").convert("La") if mode == "La" else image.convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P", "P bytes", "L", "RGB", "1"])
def test_white_is_behind_what_is_transparent(mode: str, channels: int) -> None:
    found = Preprocess(20, 0.0, 1.0, in_chans=channels)(tinted(mode))
    expected = torch.ones(channels, 20, 20)
    expected[:, 5:15, 5:15] = 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("suffix", ["png", "gif", "webp", "tif"])
def test_transparent_files_are_put_on_white(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ink.{suffix}"
    inked().save(path, **({"lossless": True} if suffix == "webp" else {}))
    found = Preprocess(20, 0.0, 1.0)(read_image(path))
    assert found[:, :5].min() == 1
    assert found[:, 6:14, 6:14].max() == 0


def test_half_transparent_is_half_white() -> None:
    found = Preprocess(4, 0.0, 1.0)(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))
    assert torch.equal(found.unique(), torch.tensor([127 / 255]))


def test_the_first_picture_of_several(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for suffix, options in (("gif", {}), ("png", {}), ("webp", {"lossless": True}), ("tif", {})):
        path = tmp_path / f"many.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert Preprocess(8, 0.0, 1.0)(read_image(path))[:, 0, 0].tolist() == [1, 0, 0], suffix


def test_a_phones_picture_with_a_second_one_inside(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(32, 16).save(path, "MPO", save_all=True, append_images=[picture(8, 8)], exif=exif)
    assert read_image(path).size == (16, 32)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
            "it is a pointer of Git LFS.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b'{"error": "not found"}', "it is JSON"),
    ],
)
def test_what_came_in_the_place_of_a_picture_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jpg: not an image, or none of .*; {what}"):
        read_image(tmp_path / "a.jpg")


# ---- whatever the program around has told Pillow ----


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program, or a library that it imports, fills cut pictures with grey."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)


@pytest.mark.parametrize("kind", [*FORMATS, "progressive JPEG", "LZW TIFF"])
@pytest.mark.parametrize("share", [0.4, 0.95])
def test_a_cut_picture_is_refused_where_the_program_fills_them(
    kind: str, share: float, tmp_path: Path, lenient
) -> None:
    options = {"progressive JPEG": {"progressive": True}, "LZW TIFF": {"compression": "tiff_lzw"}}.get(kind, {})
    path = tmp_path / "cut"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path, kind.split()[-1], **options)
    assert read_image(path).size == (64, 64)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=r"cannot read image .*cut"):
        read_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES, "the switch is the program's again"


def test_a_damaged_picture_is_refused_where_the_program_fills_them(tmp_path: Path, lenient) -> None:
    data = bytearray(png(200, 200))
    data[60:80] = bytes(20)  # within the packed pixels
    (path := tmp_path / "damaged.png").write_bytes(data)
    with pytest.raises(DataError, match=r"damaged\.png"):
        read_image(path)


def test_threads_refuse_cut_pictures_and_put_the_switch_back(tmp_path: Path, lenient) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(40):
            data = png(120, 120, i)
            (tmp_path / name / f"{i}.png").write_bytes(data[: -40 if i % 2 else None])
    found = folder(tmp_path, bad_images="skip")
    assert len(found.skipped) == 40
    assert {int(skipped.path.stem) % 2 for skipped in found.skipped} == {1}
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_fork_while_a_picture_is_decoded_leaves_the_switch_the_programs(lenient) -> None:
    with whole.only():
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
        if not (child := os.fork()):
            before = ImageFile.LOAD_TRUNCATED_IMAGES
            with whole.only():
                within = ImageFile.LOAD_TRUNCATED_IMAGES
            os._exit([before, within, ImageFile.LOAD_TRUNCATED_IMAGES] != [True, False, True])
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(("limit", "most"), [(100, 200), (89_478_484, 178_956_968)])
def test_a_limit_of_the_program_is_named_as_such(limit: int, most: int, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png(20, 20) if limit == 100 else header_of(13_378, 13_377))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=rf"more than {most:,} pixels, .*PIL\.Image\.MAX_IMAGE_PIXELS = {limit:,}\)"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**12)
    path.write_bytes(header_of(30_000, 30_000))
    with pytest.raises(DataError, match=r"more than 178,956,970 pixels, the most that is decoded; scale it down"):
        read_image(path)


@pytest.mark.filterwarnings("error")
def test_a_limit_that_the_program_has_made_an_error_is_named_as_such(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(DataError, match=r"more than 300 pixels, .*PIL\.Image\.MAX_IMAGE_PIXELS = 300\)"):
        read_image(path)


# ---- with how much memory ----


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_window_has_the_bits_of_the_whole(interpolation: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        width, height = [(3, 700), (700, 3), (13, 17), (1, 90), (2000, 1)][rng.integers(5)]
        factor = rng.uniform(1.0, 30.0)
        size = (max(width, round(width * factor)), max(height, round(height * factor)))
        shape = (height, width) if rng.random() < 0.5 else (height, width, 3)
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        left, top = (int(rng.integers(0, side)) for side in size)
        window = (left, top, min(size[0], left + 50), min(size[1], top + 50))
        resample = INTERPOLATIONS[interpolation]
        assert resized_window(image, size, window, resample).tobytes() == (
            image.resize(size, resample).crop(window).tobytes()
        )


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("img_size", [32, (32, 20)])
@pytest.mark.parametrize("shape", [(9000, 1), (1, 7001), (3, 8000)])
def test_the_transform_of_a_long_image_has_the_bits_of_the_whole(shape, img_size, interpolation, monkeypatch) -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (*shape[::-1], 3), dtype=np.uint8))
    transform = Preprocess(img_size, interpolation=interpolation, crop_pct=0.9)
    whole = transform(image)
    monkeypatch.setattr("vit.preprocess.WHOLE", 0)
    assert torch.equal(transform(image), whole)


@pytest.mark.parametrize("shape", [(60000, 1), (1, 65000), (3, 100000), (1, 10000)])
def test_a_long_thin_picture_takes_little_memory(tmp_path: Path, shape: tuple[int, int]) -> None:
    path = tmp_path / "long.png"
    path.write_bytes(png(*shape))
    code = "x = Preprocess(224)(read_image(Path(sys.argv[1]))); assert x.min() == x.max(), (x.min(), x.max())"
    assert peak(code, str(path)) < 100


def test_too_many_pixels_are_refused_by_the_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(header_of(30_000, 30_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match=r"bomb\.png: .*more than 178,956,970 pixels, the most that is decoded"):
        read_image(path)
    assert limit == Image.MAX_IMAGE_PIXELS, "Pillow's own limit is everybody's"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    try:
        Image.MAX_IMAGE_PIXELS = None  # somebody else has switched Pillow's limit off: ours stays
        with pytest.raises(DataError, match=r"30000 x 30000 pixels, more than 178,956,970"):
            read_image(path)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_a_tiff_with_huge_tiles_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiles.tif"
    entries = [
        (256, 8),
        (257, 8),
        (258, 8),
        (259, 1),
        (262, 1),
        (277, 1),
        (322, 60000),
        (323, 60000),
        (324, 300),
        (325, 9),
    ]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    path.write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4 + 300))
    with pytest.raises(DataError, match=r"tiles\.tif: .*more than 178,956,970 pixels"):
        read_image(path)


def test_large_pictures_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            (tmp_path / name / f"{i}.png").write_bytes(png(200, 200))
    monkeypatch.setattr("vit.data.folder.LARGE", 200 * 200 - 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    running, most, lock = 0, 0, threading.Lock()
    load = ImageFile.ImageFile.load

    def counted(self):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        try:
            return load(self)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", counted)
    assert not folder(tmp_path).skipped
    assert most == 1


def test_texts_in_a_png_have_a_limit(tmp_path: Path) -> None:
    data = png(8, 8)
    chunks = b""
    for i in range(100):
        text = b"zTXt" + b"key%d\0\0" % i + zlib.compress(bytes(1 << 20), 9)
        chunks += struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    path = tmp_path / "texts.png"
    path.write_bytes(data[:33] + chunks + data[33:])
    tracemalloc.start()
    with pytest.raises(DataError, match=r"texts\.png: .*(text|Text)"):
        read_image(path)
    assert tracemalloc.get_traced_memory()[1] < 300 << 20
    tracemalloc.stop()


def test_a_file_object_is_read_as_a_file() -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    buffer.seek(0)
    assert open_image(buffer).tobytes() == picture().tobytes()
    assert not buffer.closed
    deep = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep, "PNG")
    with pytest.raises(ImageError, match="more than 8 bits"):
        open_image(deep)
