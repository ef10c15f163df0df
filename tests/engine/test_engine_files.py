"""Engine files: what is loaded is what was saved, whatever happens to the file, and a damaged one is named."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import vit
from conftest import USABLE
from test_engine import ENVIRONMENT, images_for, make, signed
from vit.engine import native

pytestmark = pytest.mark.skipif("cpu" not in USABLE, reason="the cpu backend is not usable here")


class File:
    """An engine file taken apart: the JSON of its header, and its data."""

    def __init__(self, path) -> None:
        vit.Engine(make()).save(path)
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        self.header, self.data = json.loads(content[8:end]), content[end:]
        self.texts = self.header["__metadata__"]

    def write(self, path, more: bytes = b"", dump=json.dumps):
        path.write_bytes(signed(dump(self.header, separators=(",", ":")).encode()) + self.data + more)
        return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.vit"


def refused(path, message: str) -> None:
    for mmap in (False, True):
        with pytest.raises(OSError, match=message):
            vit.Engine.load(path, mmap=mmap)


def test_a_file_written_again_by_hand_is_the_same(path):
    file = File(path)
    content = path.read_bytes()
    vit.Engine.load(file.write(path))
    assert len(content) - len(path.read_bytes()) < 64


NUMBERS = {
    "norm_eps": ("x", "1e6", "-1", "nan", "inf", "", "1e-6x", " 1e-6", "1,5", "1e999", "0x1p-3"),
    "precision": ("4294967296", "-1", "3", "0x0", "0 ", "0.0", "9" * 30, ""),
    "num_heads": ("0", "3", "4294967297", "2e0", "65", "-2"),
    "num_classes": ("-1", "0", "90", "16777217", "99999999999999999999"),
    "depth": ("0", "1", "3", "4097"),
    "embed_dim": ("0", "63", "128", "65537", "9223372036854775807"),
    "image_height": ("0", "31", "40", "65537", "9223372036854775807"),
    "patch_height": ("0", "4", "9223372036854775807"),
    "mlp_width": ("0", "255", "16777217"),
    "dynamic_pad": ("2", "-1", "true"),
    "pool": ("5", "6", "7", "-1"),
    "activation": ("0", "5"),
    "channels": ("0", "4", "4097"),
    "prefix_tokens": ("0", "2"),
}


def test_numbers_out_of_range_are_named(path):
    file = File(path)
    for name, values in NUMBERS.items():
        good = file.texts[name]
        for value in values:
            file.texts[name] = value
            refused(file.write(path), "is damaged")
        file.texts[name] = good
        del file.texts[name]
        refused(file.write(path), f"says nothing about {name}")
        file.texts[name] = good
    vit.Engine.load(file.write(path))


def test_tensors_are_disjoint_complete_and_known(path):
    file = File(path)
    header, size = file.header, len(file.data)
    places = {name: record["data_offsets"] for name, record in header.items() if name != "__metadata__"}
    first, second = sorted(places, key=places.get)[:2]

    def changed(name: str, **fields) -> None:
        header[name] = header[name] | fields

    changed(second, data_offsets=places[first])
    refused(file.write(path), "overlap|leave a gap")
    changed(second, data_offsets=places[second])
    header["more"] = {"dtype": "F32", "shape": [16], "data_offsets": [size, size + 64]}
    refused(file.write(path, b"\0" * 64), "tensor more belongs to no part of the network")
    refused(file.write(path), "truncated: tensor more")
    header["more"] = header[first]
    refused(file.write(path), "overlap")
    del header["more"]
    refused(file.write(path, b"\0" * 64), "64 bytes behind its last tensor")
    good = header.pop("head.bias")
    refused(file.write(path), "behind its last tensor|leave a gap|is missing")
    header["head.bias"] = good
    for shape in ([2**61], [2**62, 4], [2**32, 2**32], [0], [-1], [2**63], [2**64]):
        changed(first, shape=shape)
        refused(file.write(path), "not an engine file")
    changed(first, shape=[(places[first][1] - places[first][0]) // 4])
    for offsets in ([0], [64, 0], [0, 2**63 - 1], [0, 2**64], [-64, 0], [0, 64, 128]):
        changed(first, data_offsets=offsets)
        refused(file.write(path), "not an engine file")
    changed(first, data_offsets=places[first])
    vit.Engine.load(file.write(path))
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for old, new in (
        (b'"head.bias":', b'"norm.weight":'),  # one name twice
        (b'"isa":', b'"format":'),
        (b'"dtype":"F32",', b'"dtype":"F32","dtype":"F32",'),
        (b"}}", b"}}}"),
        (b"}}", b"}} x"),
    ):
        text = content[8:end].replace(old, new, 1)
        assert text != content[8:end]
        path.write_bytes(signed(text) + file.data)
        refused(path, "stands twice|behind its end|not JSON")


TEXTS = {
    "class_names": ('"abc"', "5", "[1, 2]", "{}", "null", "[" * 100_000, "x", '["a", null]'),
    "preprocess": ("5", "[]", "null", '{"img_size": "x"}', '{"mean": [NaN]}', '{"img_size": {}}', "[" * 100_000, "",
                   '{"img_size": 32, "std": [0]}', '{"what": 1}',
                   '{"img_size": 32, "mean": [1, 2]}', '{"img_size": []}'),
    "weights": ("int2", "5"),
}  # fmt: skip


def test_texts_are_read_when_the_file_is(path):
    """No property of an engine raises later."""
    file = File(path)
    for name, values in TEXTS.items():
        good = file.texts.get(name)
        for value in values:
            file.texts[name] = value
            with pytest.raises(OSError, match=f"{path.name}.*{name}"):
                vit.Engine.load(file.write(path))
        file.texts.pop(name) if good is None else file.texts.update({name: good})
    file.texts["name"] = "a\x1b[2J\nb"
    engine = vit.Engine.load(file.write(path))
    assert "\x1b" not in repr(engine)


@pytest.mark.parametrize("change", ["truncate", "empty", "overwrite", "remove", "replace"])
def test_a_file_that_changes_after_loading_changes_nothing(path, change):
    model = make()
    images = images_for(model)
    vit.Engine(model).save(path)
    engine = vit.Engine.load(path)
    other = path.with_name("other.vit")
    vit.Engine(make(num_classes=4)).save(other)
    expected = vit.Engine(model)(images)
    if change == "truncate":
        os.truncate(path, 5000)
    elif change == "empty":
        os.truncate(path, 0)
    elif change == "overwrite":
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.write(b"\xff" * size)
    elif change == "remove":
        path.unlink()
    else:
        os.replace(other, path)
    assert torch.equal(engine(images), expected)
    engine.save(other)
    assert torch.equal(vit.Engine.load(other)(images), expected)


def test_mapped_weights_survive_what_replaces_the_file(path):
    """And are in memory that other processes share, not in the process's own."""
    model = make()
    images = images_for(model)
    expected = vit.Engine(model)(images)
    vit.Engine(model).save(path)
    engine = vit.Engine.load(path, mmap=True)
    vit.Engine(make(num_classes=4)).save(path)
    assert torch.equal(engine(images), expected)
    engine.save(path)  # over the name of the file it has mapped
    assert torch.equal(engine(images), expected)
    assert torch.equal(vit.Engine.load(path)(images), expected)
    assert str(path) in Path("/proc/self/maps").read_text()


def test_saving_follows_no_link_and_leaves_nothing_behind(tmp_path):
    engine = vit.Engine(make())
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "model.vit"
    for name in (".model.vit.tmp", "model.vit.part", ".model.vit.part"):  # where an archive might have put a link
        (folder / name).symlink_to(victim)
    path.symlink_to(victim)
    with pytest.raises(OSError, match="it is a symbolic link"):
        engine.save(path)
    assert path.is_symlink()
    path.unlink()
    engine.save(path)
    assert victim.read_text() == "precious"
    vit.Engine.load(path)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    for name in (".model.vit.tmp", "model.vit.part", ".model.vit.part"):
        (folder / name).unlink()
    assert os.listdir(folder) == ["model.vit"]
    os.mkfifo(folder / "fifo")
    (folder / "device").symlink_to("/dev/null")
    for bad in (folder, folder / "fifo", "/dev/null", folder / "device", "", folder / "no" / "folder.vit"):
        with pytest.raises(OSError, match=r"cannot write|is empty"):
            engine.save(bad)
    with pytest.raises(ValueError, match="null character"):
        engine.save(f"{folder}/a\0b")
    for action in (engine.save, vit.Engine.load):
        with pytest.raises(ValueError, match=r"the path '.*ud800.vit' cannot be the name of a file"):
            action(f"{folder}/\ud800.vit")
    assert sorted(os.listdir(folder)) == ["device", "fifo", "model.vit"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_savers_at_the_same_time_share_no_file(path):
    engines = [vit.Engine(make()), vit.Engine(make(num_classes=4))]
    failed = []

    def work(engine) -> None:
        try:
            for _ in range(20):
                engine.save(path)
                vit.Engine.load(path)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert os.listdir(path.parent) == [path.name]


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for bad in (tmp_path / "fifo", tmp_path / "link", tmp_path, "/dev/zero", "/dev/null"):
        refused(bad, "is not a file")
    refused(tmp_path / "empty", "is empty")
    for bad in ("", tmp_path / "absent", tmp_path / "a" / "b"):
        with pytest.raises(FileNotFoundError):
            vit.Engine.load(bad)
    with open(tmp_path / "sparse", "wb") as file:
        file.write((2**40).to_bytes(8, "little") + b"{")
        file.truncate(2**40 + 8)
    refused(tmp_path / "sparse", "its header has")


def test_the_c_interface_takes_null_and_nonsense(tmp_path):
    """Every function, called as a C program might by mistake: an error with a text, never a crash."""
    library = native.library()
    model = make()
    engine = vit.Engine(model)
    handle = engine._handle
    number = ctypes.c_int64()
    config = native.Config()
    for status in (
        library.get_config(None, config), library.get_config(handle, None), library.memory(None, number, number),
        library.profile(None, 1), library.profile_read(None, (ctypes.c_double * 99)()),
        library.profile_read(handle, None), library.save(None, b"x"), library.save(handle, None),
        library.forward(None, None, None, 0, 0), library.forward(handle, None, None, 0, 0), library.name(0, None),
        library.name(-1, native._Name()), library.name(2**31 - 1, native._Name()),
    ):  # fmt: skip
        assert status == native.STATUS["invalid"]
        assert library.last_error().startswith(b"vit engine: ")
    assert library.memory(handle, None, None) == 0
    assert library.text(None, b"isa") is None
    assert library.text(handle, None) is None
    assert library.text(handle, b"nothing") is None
    assert library.phase_name(-1) is None
    library.destroy(None)
    for path in (None, b"", os.fsencode(tmp_path), b"/dev/zero"):
        assert library.create(path, 0) is None
        assert library.map(path, 0) is None
    assert library.create(b"/dev/zero", -1) is None

    images = torch.zeros(1, 3, 32, 32)
    logits = torch.zeros(1, 10)
    good = {"data": images.data_ptr(), "pixels": 1, "layout": 0, "batch": 1, "channels": 3, "height": 32, "width": 32}
    output = native.Output(0, 0, logits.data_ptr(), 10)
    assert library.forward(handle, native.Images(**good), output, 1, 0) == 0
    most = 2**63 - 1
    for bad in (
        {"data": None}, {"pixels": 2}, {"pixels": -1}, {"layout": 2}, {"batch": -1}, {"batch": most},
        {"batch": 2**60}, {"channels": most}, {"height": most}, {"width": most}, {"height": -most}, {"width": 0},
    ):  # fmt: skip
        assert library.forward(handle, native.Images(**(good | bad)), output, 1, 0), bad
    padding = vit.Engine(make(img_size=(30, 29), dynamic_pad=True))
    for size in (most, -most, 0, 33, 24):
        given = native.Images(**(good | {"height": size, "width": 29}))
        assert library.forward(padding._handle, given, output, 1, 0), size
    for bad in ((9, 0), (-1, 0), (2, 2), (2, -1), (3, most % 2**31)):
        assert library.forward(handle, native.Images(**good), native.Output(*bad, logits.data_ptr(), 10), 1, 0), bad
    for bad in ((0, 0, None, 10), (0, 0, logits.data_ptr(), 9), (0, 0, logits.data_ptr(), -1)):
        assert library.forward(handle, native.Images(**good), native.Output(*bad), 1, 0), bad
    assert library.forward(handle, native.Images(**good), output, -1, 0)
    assert library.forward(handle, native.Images(**good), None, 1, 0)
    assert library.forward(handle, native.Images(**good), output, 1, -1)
    assert library.forward(handle, native.Images(**good), None, 0, 0) == 0
    assert library.forward(handle, native.Images(**good), output, 1, 2**31 - 1) == 0
    assert torch.equal(engine(images), logits)


def built(config: dict, tensors: list, texts: list = (), counts: tuple[int, int] | None = None) -> str:
    """Why vit_engine_build refuses; empty where it does not."""
    library = native.library()
    weights = (native.Weight * len(tensors))(*[native.Weight(*tensor) for tensor in tensors])
    kept = (native.Text * len(texts))(*[native.Text(*text) for text in texts])
    n, m = counts or (len(tensors), len(texts))
    handle = library.build(native.Config(**config), weights, n, kept, m, 0)
    if handle is None:
        return library.last_error().decode()
    library.destroy(handle)
    return ""


def test_a_build_reads_every_tensor_and_names_the_one_it_does_not():
    from vit.engine.freeze import freeze

    frozen = freeze(make(), "float32")
    keep = frozen.tensors

    def tensors(**more) -> list:
        return [
            (name.encode(), t.data_ptr(), t.numel(), frozen.precisions.get(name, 0))
            for name, t in (keep | {k.replace("__", "."): v for k, v in more.items()}).items()
        ]

    assert built(frozen.config, tensors()) == ""
    gamma = torch.ones(64)
    for name in (
        "blocks__0__ls1__gamma",
        "blocks__0__attn__q_norm__weight",
        "blocks__2__norm1__weight",
        "pos",
        "fc_norm__bias",
    ):
        message = built(frozen.config, tensors(**{name: gamma}))
        assert f"no part that reads {name.replace('__', '.')};" in message, message
    bias = torch.zeros(10)
    assert "head.weight" in built(frozen.config | {"num_classes": 0}, tensors())
    assert "twice" in built(frozen.config, [*tensors(), (b"head.bias", bias.data_ptr(), 10, 0)])
    assert "name of tensor" in built(frozen.config, [*tensors(), (None, bias.data_ptr(), 10, 0)])
    assert "key or value" in built(frozen.config, tensors(), [(None, b"x")])
    assert "key or value" in built(frozen.config, tensors(), [(b"x", None)])
    assert "num_tensors is -1" in built(frozen.config, tensors(), counts=(-1, 0))
    assert "num_texts is -1" in built(frozen.config, tensors(), counts=(len(keep), -1))
    for value in (torch.nan, torch.inf):
        assert "head.bias holds NaN" in built(frozen.config, tensors(head__bias=torch.full((10,), value)))
    assert "std" in built(frozen.config, tensors(std=torch.zeros(3)))
    wide = frozen.config | {"precision": native.PRECISIONS["int8"], "mlp_width": 262144}
    assert "mlp_width is 262144; allowed are 1 to 65536" in built(wide, tensors())
    many = frozen.config | {"image_height": 65536, "image_width": 65536, "patch_height": 1, "patch_width": 1}
    assert "number of patches" in built(many, tensors())


def test_numbers_are_written_as_everywhere(path):
    """Whatever decimal point the program has chosen."""
    script = f"""
import locale, vit
for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "de_DE", "C.UTF-8"):
    try:
        locale.setlocale(locale.LC_ALL, name)
        break
    except locale.Error:
        pass
arch = dict(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2, norm_eps=1.5e-3, num_classes=3)
model = vit.create("vit_tiny_patch16_224", backend="reference", training=False, **arch)
vit.Engine(model).save({str(path)!r})
assert vit.Engine.load({str(path)!r}).config["norm_eps"] == 1.5e-3
"""
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert vit.Engine.load(path).config["norm_eps"] == 1.5e-3
