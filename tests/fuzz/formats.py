"""The formats: where their seeds lie, how an input is made of one, what reads it and what must hold then."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .containers import change_engine, change_pickle, change_png, change_safetensors, change_zip
from .mutate import TEXTS, VALUES, Draw, change_bytes, change_json, change_words, change_yaml

MIB = 1 << 20


@dataclass
class Change:
    """What was done to an input, and what follows from it.

    same: accepted, it must give the undamaged file's results. differs: the keys whose other value must show.
    """

    note: str
    same: bool = False
    differs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """change: changes the copy of a seed (a file or a folder) in place; count: how many `.ci/run` tries."""

    use: str
    change: Callable[[Draw, Path], Change]
    count: int
    names: bool = True  # errors name the input
    memory: int = 512 * MIB
    seconds: float = field(default=0.02, kw_only=True)  # of one input, about


def _file(change: Callable[[Draw, bytes], bytes], same: bool = False) -> Callable[[Draw, Path], Change]:
    def changed(draw: Draw, path: Path) -> Change:
        data = path.read_bytes()
        how = change if draw.chance(0.7) else change_bytes
        path.write_bytes(how(draw, data))
        return Change(how.__name__, same)

    return changed


def _engine(draw: Draw, path: Path) -> Change:
    data, forged = change_engine(draw, path.read_bytes())
    path.write_bytes(data)
    return Change("a forged checksum" if forged else "change_engine", same=not forged)


def _image(draw: Draw, path: Path) -> Change:
    data = path.read_bytes()
    if draw.chance(0.05):  # another format under this name
        data = draw.of(_FOREIGN)
        path.write_bytes(data)
        return Change("another format")
    how = change_png if path.suffix == ".png" and draw.chance(0.6) else change_bytes
    path.write_bytes(how(draw, data))
    return Change(how.__name__)


_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print showpage\n"
_FOREIGN = (
    _EPS,
    b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + len(_EPS).to_bytes(4, "little") + b"\x00" * 18 + _EPS,
    b"%PDF-1.4\n%%EOF\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/hostname'/></svg>",
    b"\xd7\xcd\xc6\x9a" + b"\x00" * 60,  # WMF
    b'/* XPM */\nstatic char * x[] = {\n"1 1 1 1",\n"a c #000000",\n"a"};\n',
    b"SIMPLE  =                    T" + b" " * 2850,  # FITS
    b"P7 332\n#XVVERSION\n#END_OF_COMMENTS\n8 8 255\n" + b"\x00" * 64,
    b"",
)


def _idx(draw: Draw, path: Path) -> Change:
    file = draw.of(sorted(path.iterdir()))
    data = file.read_bytes()
    if file.suffix == ".gz" and draw.chance(0.5):
        plain = change_bytes(draw, gzip.decompress(data))
        file.write_bytes(gzip.compress(plain + b"\x00" * draw.of((0, 0, 0, 1 << 28)), 1, mtime=0))
        return Change(f"{file.name}: inside gzip")
    file.write_bytes(change_bytes(draw, data))
    return Change(file.name)


def _folder(files: tuple[str, ...], free: tuple[str, ...]) -> Callable[[Draw, Path], Change]:
    """One file of a folder changed: records as JSON, or what the file system can do; `free` keys change no result."""

    def change(draw: Draw, path: Path) -> Change:
        file = path / draw.of(files)
        if draw.chance(0.1):
            return _file_system(draw, file)
        if file.suffix != ".json":
            file.write_bytes(change_safetensors(draw, file.read_bytes()))
            return Change(file.name)
        if draw.chance(0.1):
            file.write_bytes(change_bytes(draw, file.read_bytes()))
            return Change(f"{file.name}: bytes")
        text, keys = change_json(draw, file.read_text())
        file.write_text(text)
        return Change(f"{file.name}: {'.'.join(keys)}", differs=() if set(keys) & set(free) else keys)

    return change


def _file_system(draw: Draw, file: Path) -> Change:
    """The file is gone, empty, a folder, a pipe, or a link to nothing, to itself, to a device."""
    file.unlink()
    kind = draw.of(("gone", "empty", "folder", "pipe", "broken link", "circle", "device"))
    if kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "gone":
        file.symlink_to({"broken link": "nowhere", "circle": file.name, "device": "/dev/zero"}[kind])
    return Change(f"{file.name}: {kind}")


def _predict(draw: Draw, path: Path) -> Change:
    file = path / draw.of(("model.json", "model.json", "best.safetensors"))
    if file.suffix == ".json":
        return _folder(("model.json",), ("img_size", "in_chans", "name", "global_pool"))(draw, path)
    file.write_bytes(change_safetensors(draw, file.read_bytes()))
    return Change(file.name, same=True)


def _resume(draw: Draw, path: Path) -> Change:
    name = draw.of(("config.yaml", "config.yaml", "model.json", "metrics.jsonl", "checkpoint.safetensors"))
    file = path / name
    kind = draw.below(6)
    if kind == 0:
        return _file_system(draw, file)
    if kind <= 2:  # what a training that was killed leaves behind, or what nothing reads
        left = path / draw.of((".checkpoint.safetensors.tmp", ".metrics.jsonl.0.tmp", "curves.png"))
        left.write_bytes(draw.bytes(100))
        return Change(left.name, same=True)
    if name == "config.yaml":
        while True:
            text = change_yaml(draw, file.read_text())
            if not any(line.startswith("workers:") and line != "workers: 0" for line in text.splitlines()):
                break
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
    elif name == "model.json":
        file.write_text(change_json(draw, file.read_text())[0])
    else:
        file.write_bytes(change_bytes(draw, file.read_bytes()))
    return Change(name, same=name == "checkpoint.safetensors")


def _yaml(draw: Draw, path: Path) -> Change:
    path.write_text(change_yaml(draw, path.read_text()), encoding="utf-8", errors="surrogateescape")
    return Change("change_yaml")


#: Command lines that end soon; RUN and PICTURE lie in the worker's folder or not at all.
LINES = (
    ["train", "--print-config", "--lr", "0.1", "--arch", "depth=2"],
    ["train", "--print-config", "--config", "few.yaml", "--epochs", "3"],
    ["predict", "run", "picture.png", "--json", "--top", "2"],
    ["eval", "run", "--json"],
    ["info", "--json"],
    ["info", "vit_tiny_patch16_224", "--json"],
)
POOL = (
    *("--lr", "--epochs", "--arch", "--data", "--config", "--recipe", "--resume", "--model", "--weights", "--top"),
    *("--json", "--csv", "--backend", "--threads", "--batch-size", "--class-names", "--help", "-h", "--", "-", "--x"),
    *("depth=2", "depth=", "=", "a=b=c", "img_size=[1, 2]", "depth=&a [*a]", "[" * 3000, "digits", "no-such", "."),
    *("cpu", "reference", "auto", "\udcff", "--lr=nan", "--lr=1e999", "--epochs=-1", "--seed=99999999999999999999"),
)


def _short(words: list[str]) -> bool:
    """Not a training, and nothing that writes where a word says."""
    if "--csv" in words or "--out" in words or any(word.startswith(("--csv=", "--out=")) for word in words):
        return False
    if words[0] == "train":
        return "--print-config" in words or "--help" in words
    return words[0] in ("predict", "eval", "info")


def _words(draw: Draw, path: Path) -> Change:
    path.write_text(json.dumps(change_words(draw, draw.of(LINES), POOL, _short)))
    return Change("change_words")


#: Keys of a record that tell no result: about the file or training, or repeated by the tensors.
_TIMM = ("num_features", "pool_size", "first_conv", "classifier", "num_classes", "fixed_input_size", "architecture")
_TRANSFORMERS = ("architectures", "initializer_range", "label2id", "num_channels", "rescale_factor")
_TRANSFORMERS += ("image_processor_type",)

FORMATS: dict[str, Format] = {
    "safetensors": Format("safetensors", _file(change_safetensors), 250),
    "npz": Format("npz", _file(change_zip), 150),
    "pt": Format("pickle", _file(change_pickle), 150),
    "timm": Format("folder", _folder(("config.json", "config.json", "config.json", "model.safetensors"), _TIMM), 120),
    "transformers": Format(
        "folder",
        _folder(("config.json", "config.json", "preprocessor_config.json", "model.safetensors"), _TRANSFORMERS),
        120,
    ),
    "run": Format("predict", _predict, 60, seconds=0.05),
    "resume": Format("resume", _resume, 10, names=False, seconds=1.0),
    "checkpoint": Format("checkpoint", _file(change_safetensors, same=True), 150),
    "engine": Format("engine", _engine, 250),
    "idx": Format("idx", _idx, 120),
    # The largest picture that is decoded takes 0.7 GB (vit.support.images.MAX_PIXELS), and a copy of that in RGB.
    "images": Format("image", _image, 400, memory=2048 * MIB),
    "config": Format("config", _yaml, 120),
    "words": Format("words", _words, 120, names=False),
}

#: Where the seeds of a format lie, if not in a folder of its name.
SEEDS = {"checkpoint": "run/checkpoint.safetensors", "resume": "run", "run": "run", "words": "config/few.yaml"}
SEEDS |= {"timm": "timm", "transformers": "transformers"}


def seeds_of(name: str, folder: Path) -> list[Path]:
    """The sound files (or folders) of a format."""
    if name in SEEDS:
        return [folder / SEEDS[name]]
    return sorted((folder / name).iterdir()) if (folder / name).is_dir() else []


def make(name: str, seed: int, index: int, seeds: list[Path], to: Path) -> tuple[Path, Path, Change]:
    """Input `index` of a format: its path below `to`, the seed it was made of, and what was changed."""
    draw = Draw(seed, name, index)
    source = draw.of(seeds)
    path = to / source.name
    to.mkdir(parents=True)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    return path, source, FORMATS[name].change(draw, path)


__all__ = ["FORMATS", "TEXTS", "VALUES", "Change", "Format", "make", "seeds_of"]


def job_of(name: str, path: Path, source: Path, change: Change, digest: str) -> dict[str, Any]:
    """What a worker is told about an input."""
    fmt = FORMATS[name]
    return {
        **{"use": fmt.use, "path": str(path), "seed": str(source), "names": fmt.names, "memory": fmt.memory},
        **{"digest": digest, "same": change.same, "differs": list(change.differs)},
    }
