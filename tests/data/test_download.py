"""Published data sets from a server of this machine: checksums, what is missing, what is damaged."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import json
import pickle
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from vit.cli import main
from vit.data import kind_of, open_source

datasets = pytest.importorskip("torchvision.datasets")


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address at which the folder `server` is offered."""
    handler = functools.partial(Quiet, directory=str(tmp_path / "server"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture
def published(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small MNIST and CIFAR-10, as the server of torchvision's addresses and checksums."""
    server = tmp_path / "server"
    server.mkdir()
    images, labels = np.arange(20 * 28 * 28).reshape(20, 28, 28) % 251, np.arange(20) % 10
    resources = []
    for split, n in (("train", 20), ("t10k", 10)):
        for kind, array in (("images-idx3", images[:n]), ("labels-idx1", labels[:n])):
            data = gzip.compress(idx(array), mtime=0)
            (server / f"{split}-{kind}-ubyte.gz").write_bytes(data)
            resources.append((f"{split}-{kind}-ubyte.gz", md5(data)))
    monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
    monkeypatch.setattr(datasets.MNIST, "resources", resources)

    batches = server / "cifar-10-batches-py"
    batches.mkdir()
    rows = {
        b"data": np.arange(10 * 3072, dtype=np.int64).reshape(10, 3072).astype(np.uint8),
        b"labels": list(range(10)),
    }
    names = {"label_names": [f"class{i}" for i in range(10)]}
    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        data = pickle.dumps(names if name == "batches.meta" else rows, protocol=2)
        (batches / name).write_bytes(data)
        if name == "batches.meta":
            monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": md5(data)})
        else:
            lists["test_list" if name == "test_batch" else "train_list"].append([name, md5(data)])
    for key, value in lists.items():
        monkeypatch.setattr(datasets.CIFAR10, key, value)
    archive = server / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, batches.name)
    monkeypatch.setattr(datasets.CIFAR10, "url", address + archive.name)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive.read_bytes()))
    return server


@pytest.mark.parametrize(("name", "images"), [("mnist", 20), ("cifar10", 50)])
def test_a_download_can_be_trained_on(
    published: Path, tmp_path: Path, name: str, images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "download", name, "--out", str(tmp_path / "data")]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["downloaded"]
    assert kind_of(found["data"]) == {"mnist": "mnist", "cifar10": "cifar"}[name]
    source = open_source(found["data"])
    assert (len(source.splits["train"]), len(source.splits["test"])) == (images, 10)
    for path in published.rglob("*"):  # no network any more
        path.unlink() if path.is_file() else None
    assert main([*words, "--offline", "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["downloaded"]
    assert main(words) == 0
    assert f"there already, {len(found['files'])} files as published" in capsys.readouterr().out


def test_a_damaged_file_is_named(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that lies there, one that the server gives, and one that neither has."""
    words = ["data", "download", "mnist", "--out", str(tmp_path / "data")]
    assert main([*words, "--offline"]) == 1
    error = capsys.readouterr().err
    assert "mnist lacks train-images-idx3-ubyte.gz, " in error
    assert str(tmp_path / "data" / "MNIST" / "raw") in error
    assert main(words) == 0
    there = tmp_path / "data" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    there.write_bytes(there.read_bytes() + b"\0")
    assert main(words) == 1
    assert f"{there} is not the published file" in capsys.readouterr().err
    words[-1] = str(tmp_path / "other")
    (published / "train-images-idx3-ubyte.gz").write_bytes(b"another")
    assert main(words) == 1
    assert "mnist could not be downloaded (" in capsys.readouterr().err


def test_names_and_the_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "download", "imagenet", "--out", str(tmp_path)]) == 1
    assert "no download of 'imagenet'; known are mnist, fashion_mnist" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.datasets", raising=False)
    assert main(["data", "download", "mnist", "--out", str(tmp_path)]) == 1
    assert "pip install 'vit-kernels[aug]'" in capsys.readouterr().err
