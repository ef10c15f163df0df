"""Reading a file as a user would. Each function returns a digest of everything that was read.

`Wrong`: the file was accepted, and what was read is not what an independent reader (NumPy, safetensors, torch, Pillow,
or a few lines here) finds in it.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import logging
import math
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vit
from torch import Tensor

from .seeds import ARCH, NAME, jax_arrays


class Wrong(Exception):
    """A file whose content is not what was read from it."""


class Named(Exception):
    """An error of the command line; its text is what a user saw."""


class Traceback(Exception):
    """An error of the command line that no user should see."""


def digest_of(*parts: Any) -> str:
    """A digest of tensors, texts and whatever has a repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Mapping):
            part = digest_of(*(item for key in sorted(part) for item in (key, part[key])))
        if isinstance(part, Tensor):
            part = part.detach().contiguous().cpu()
            digest.update(f"{part.dtype}{list(part.shape)}".encode())
            digest.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(part).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


# ---- weights ----


def weights(path: Path, found: Mapping[str, np.ndarray]) -> str:
    """A model with the file's weights, compared with what another reader found."""
    model = vit.create(NAME, weights=path, backend="reference", **ARCH)
    if path.suffix == ".npz" and "pos_embed" not in model.state_dict() and any("pos" in key for key in found):
        raise Wrong("the positions of the file were left out")
    _same(jax_arrays(model) if path.suffix == ".npz" else _arrays(model.state_dict()), found)
    return digest_of(model.state_dict())


def _arrays(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: value.float().numpy() for key, value in state.items()}


def _same(got: Mapping[str, np.ndarray], found: Mapping[str, Any]) -> None:
    for key, value in got.items():
        there = found.get(key)
        if there is None:  # a wrapper's prefix may stand before any name
            wrapped = [name for name in found if name.endswith(f".{key}")]
            if len(wrapped) != 1:
                raise Wrong(f"{key} is not in the file")
            there = found[wrapped[0]]
        if there.dtype.kind not in "fV" and there.dtype.name != "bfloat16":
            raise Wrong(f"{key} is {there.dtype} in the file")
        with np.errstate(over="ignore"):
            cast = there.astype(np.float32)
        if cast.shape != value.shape and cast.size != value.size:
            continue  # another patch grid or number of channels: adapted, with a line in the log
        if not np.isfinite(cast).all() or not np.array_equal(cast.reshape(value.shape), value):
            raise Wrong(f"{key} has other values in the file")


def safetensors(path: Path) -> str:
    return weights(path, Lazy(lambda: _safetensors(path.read_bytes())))


def _safetensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, by its specification; a prefix of wrappers is left out."""
    end = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, record in json.loads(data[8:end]).items():
        if name == "__metadata__":
            continue
        first, last = record["data_offsets"]
        raw = data[end + first : end + last]
        kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1", "I32": "<i4", "I64": "<i8"}
        if record["dtype"] == "BF16":
            array = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        elif record["dtype"] in kinds:
            array = np.frombuffer(raw, kinds[record["dtype"]])
        else:
            array = torch.frombuffer(bytearray(raw), dtype=_DTYPES.get(record["dtype"], torch.uint8)).float().numpy()
        found[_unwrapped(name)] = array.reshape(record["shape"])
    return found


_DTYPES = {
    name: getattr(torch, dtype)
    for name, dtype in (("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"))
    if hasattr(torch, dtype)
}


def _unwrapped(name: str) -> str:
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name


class Lazy(Mapping[str, Any]):
    """Read only after vit has accepted the file, so that memory and time are vit's own."""

    def __init__(self, read: Any) -> None:
        self._read, self._found = read, None

    def _all(self) -> dict[str, Any]:
        if self._found is None:
            try:
                self._found = self._read()
            except Exception as error:
                raise Wrong(f"another reader refuses it: {type(error).__name__}: {error}") from error
        return self._found

    def __getitem__(self, key: str) -> Any:
        return self._all()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def npz(path: Path) -> str:
    def read() -> dict[str, np.ndarray]:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return weights(path, Lazy(read))


def pickle(path: Path) -> str:
    def read() -> dict[str, np.ndarray]:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, weights_only=True, map_location="cpu")
        tables = [value for value in found.values() if isinstance(value, Mapping)]
        found = found.get("state_dict", tables[0] if len(tables) == 1 else found)  # whatever its name is
        return {
            _unwrapped(key): value.float().numpy() if value.is_floating_point() else value.numpy()
            for key, value in found.items()
            if isinstance(value, Tensor)
        }

    return weights(path, Lazy(read))


# ---- folders ----


def folder(path: Path) -> str:
    """A model from a folder with its records: everything they can say is part of the digest, as is what is said of
    them."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage().replace(str(path), ""))  # type: ignore[method-assign]
    logging.getLogger("vit").addHandler(handler)
    try:
        model = vit.create(weights=path, backend="reference")
    finally:
        logging.getLogger("vit").removeHandler(handler)
    image = _ramp(model.patch_embed.in_chans, *model.patch_embed.img_size)
    with torch.inference_mode():
        output = model(image)
    return digest_of(repr(model), repr(model.preprocess), model.class_names, model.state_dict(), output, said)


def _ramp(*size: int) -> Tensor:
    """An image [1, C, H, W] that is everywhere different."""
    return torch.linspace(-1, 1, math.prod(size)).view(1, *size)


def predict(path: Path) -> str:
    """`vit predict` with a run folder."""
    image = Path("picture.png")
    if not image.exists():
        from PIL import Image

        Image.linear_gradient("L").resize((8, 8)).save(image)
    printed = json.loads(command(["predict", str(path), str(image), "--json", "--top", "10"]))
    return digest_of(printed["predictions"][0]["top"])


class _Enough(BaseException):
    """A training that has shown that it works."""


def resume(path: Path) -> str:
    """A training that goes on to its end, or for forty steps where a changed option makes it longer."""
    from vit.training import train
    from vit.training.progress import Silent

    class Stop(Silent):
        steps = 0

        def step(self, text: str) -> None:
            self.steps += 1
            if self.steps == 40:
                raise _Enough

    try:
        train(resume=path, display=Stop())
    except _Enough:
        return "a longer training"
    finally:
        import matplotlib.pyplot as plt

        plt.close("all")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    figures = [
        {k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "step_ms")} for line in lines
    ]
    return digest_of(figures, *((path / f"{name}.safetensors").read_bytes() for name in ("best", "last")))


def checkpoint(path: Path) -> str:
    """The state of a training, put back into model, average and optimizer."""
    from vit.training import state

    progress, facts, tensors = state.load(path)
    return digest_of(repr(progress), json.dumps(facts.values, sort_keys=True), tensors)


# ---- engine files ----


def engine(path: Path) -> str:
    engine = vit.Engine.load(path)
    sizes = engine._config
    image = _ramp(sizes.channels, sizes.image_height, sizes.image_width)
    output = engine(image, outputs=("logits", "features", "tokens.0"))
    return digest_of(output, repr(engine.preprocess), engine.class_names, engine.dtype)


# ---- data ----


def idx(path: Path) -> str:
    from vit.data import open_source

    source = open_source(str(path))
    parts: list[Any] = [source.class_names]
    for split, prefix in (("train", "train"), ("test", "t10k")):
        if split not in source.splits:
            continue
        samples = source.splits[split]
        images, labels = _idx(path, f"{prefix}-images-idx3-ubyte", 3), _idx(path, f"{prefix}-labels-idx1-ubyte", 1)
        if not np.array_equal(np.asarray(samples.images), images):
            raise Wrong(f"the {split} images are others")
        names = [int(source.class_names[i]) for i in samples.labels.tolist()]
        if names != labels.tolist():
            raise Wrong(f"the {split} labels are others")
        parts += [torch.from_numpy(images.copy()), torch.from_numpy(labels.copy())]
    return digest_of(*parts)


def _idx(path: Path, name: str, dimensions: int) -> np.ndarray:
    file = path / name
    data = file.read_bytes() if file.exists() else Path(f"{file}.gz").read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
        if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != 4 + 4 * dimensions + math.prod(shape):
            raise ValueError("the header does not fit the data")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except Exception as error:
        raise Wrong(f"another reader refuses {name}: {error}") from error


def image(path: Path) -> str:
    """A decoded picture, and as a model would get it."""
    from PIL import Image, ImageOps
    from vit.data.samples import read_image
    from vit.preprocess import Preprocess

    found = read_image(path)
    size = found.size
    tensor = Preprocess(img_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)(found)
    if tensor.shape != (3, 16, 16) or not torch.isfinite(tensor).all():
        raise Wrong(f"a tensor of {list(tensor.shape)}, finite: {bool(torch.isfinite(tensor).all())}")
    del found
    try:
        with Image.open(path) as other:
            other.load()
            with contextlib.suppress(Exception):  # a damaged EXIF of a sound picture
                other = ImageOps.exif_transpose(other)
    except Exception as error:
        raise Wrong(f"Pillow refuses it: {type(error).__name__}: {error}") from error
    if other.size != size:
        raise Wrong(f"{size} instead of {other.size}")
    opaque = other.mode in ("1", "L", "P", "RGB") and "transparency" not in other.info
    if opaque and other.width * other.height < 1e6:
        with read_image(path) as again:
            if not np.array_equal(np.asarray(again.convert("RGB")), np.asarray(other.convert("RGB"))):
                raise Wrong("other pixels than Pillow's")
    return digest_of(tensor)


# ---- options ----


def config(path: Path) -> str:
    """`vit train --config`, and its output once more: what is printed must mean the same."""
    first = command(["train", "--config", str(path), "--print-config"])
    again = Path("printed.yaml")
    again.write_text(first, encoding="utf-8")
    if command(["train", "--config", str(again), "--print-config"]) != first:
        raise Wrong("the printed options are read as other options")
    return digest_of(first)


def words(path: Path) -> str:
    """A command line, stored as JSON."""
    return digest_of(command(json.loads(path.read_text())))


def script(path: Path) -> str:
    """A Python text: what the tests of the watching itself run."""
    exec(path.read_text(), {"Wrong": Wrong})
    return "done"


def command(words: list[str]) -> str:
    """Standard output of a vit command; Named or Traceback when it ends otherwise."""
    from vit.cli import main

    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams
    try:
        code = main([os.fsdecode(os.fsencode(word)) for word in words])
    except SystemExit as stop:
        raise Traceback(f"SystemExit({stop.code})") from stop
    finally:
        sys.stdout, sys.stderr = before
    out, err = (stream.buffer.getvalue().decode("utf-8") for stream in streams)  # type: ignore[attr-defined]
    if code == 0:
        return out
    if code not in (1, 2) or "Traceback" in err or not (err.startswith(("vit", "usage: vit")) or "vit: " in err):
        raise Traceback(f"exit code {code}: {err}")
    if any(ord(c) < 32 and c not in "\n\t" for c in err):
        raise Traceback(f"control characters in {err!r}")
    raise Named(err)
