"""Kinds of data sets beside folders, digits and IDX: what is read of each, and what is refused by name and place."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vit.data import DataError, class_names, kind_of, open_source
from vit.data.sources import formats

NAMES = [f"class{i}" for i in range(10)]


def pictures(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (count, *shape)).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(source, split: str, index: int) -> np.ndarray:
    return np.asarray(source.splits[split].image(index))


# ---- CIFAR ----


def write_cifar(folder: Path, labels: list[int], binary: bool, hundred: bool = False) -> np.ndarray:
    """Two training batches and a test batch, as CIFAR-10's, or the files of CIFAR-100."""
    folder.mkdir(parents=True)
    data = pictures(len(labels), 3072)
    batches = {"train": slice(None), "test": slice(0, 3)} if hundred else {
        "data_batch_1": slice(0, 6), "data_batch_2": slice(6, None), "test_batch": slice(0, 3),
    }  # fmt: skip
    for name, part in batches.items():
        if binary:
            head = [np.array(labels[part], np.uint8)[:, None]] * (1 + hundred)
            (folder / f"{name}.bin").write_bytes(np.concatenate([*head, data[part]], axis=1).tobytes())
        else:
            key = b"fine_labels" if hundred else b"labels"
            (folder / name).write_bytes(pickle.dumps({b"data": data[part], key: labels[part]}, protocol=2))
    if binary:
        (folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text("\n".join(NAMES) + "\n\n")
    else:
        texts = [name.encode() for name in NAMES] if hundred else NAMES  # as Python 3 writes them, and as published
        names = {"fine_label_names" if hundred else "label_names": texts}
        (folder / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(names, protocol=2))
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_cifar(tmp_path: Path, binary: bool, hundred: bool) -> None:
    labels = [*range(10), 0, 1]
    images = write_cifar(tmp_path / "cifar-10-batches-py", labels, binary, hundred)
    source = open_source(str(tmp_path))
    assert (source.kind, source.class_names) == ("cifar", tuple(NAMES))
    assert source.splits["train"].labels.tolist() == labels
    assert source.splits["test"].labels.tolist() == [0, 1, 2]
    assert np.array_equal(pixels_of(source, "train", 7), images[7])


def test_a_pickle_of_cifar_runs_nothing(tmp_path: Path) -> None:
    write_cifar(tmp_path / "c", [*range(10)], binary=False)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            import os

            return os.mkdir, (str(marker),)

    (tmp_path / "c" / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(DataError, match=r"data_batch_1 is no file of CIFAR, or damaged: it asks for \w+.mkdir"):
        open_source(str(tmp_path / "c"))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("data_batch_1", b"", "data_batch_1 is no file of CIFAR, or damaged"),
        ("data_batch_1", pickle.dumps([1]), "holds a list"),
        ("data_batch_1", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "and 1 labels"),
        ("data_batch_1", pickle.dumps({"data": np.zeros((1, 3072), np.int64), "labels": [0]}), "not of uint8"),
        ("data_batch_1", pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [12]}), "the label 12; "),
        ("batches.meta", pickle.dumps({"label_names": 3}), "no list of label_names"),
    ],
)  # fmt: skip
def test_damaged_cifar_is_named(tmp_path: Path, file: str, content: bytes, text: str) -> None:
    write_cifar(tmp_path / "c", [*range(10)], binary=False)
    (tmp_path / "c" / file).write_bytes(content)
    with pytest.raises(DataError, match=text):
        open_source(str(tmp_path / "c"))


def test_a_binary_cifar_file_of_another_length_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path / "c", [*range(10)], binary=True)
    with open(tmp_path / "c" / "data_batch_1.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"data_batch_1.bin has \d+ bytes, which are no whole number of records"):
        open_source(str(tmp_path / "c"))


# ---- arrays ----


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (8, 9, 3), (1, 8, 9), (3, 8, 9)])
@pytest.mark.parametrize("as_npz", [True, False])
def test_arrays(tmp_path: Path, shape: tuple[int, ...], as_npz: bool) -> None:
    images, labels = pictures(6, *shape), np.array([0, 1, 2, 0, 1, 2])
    found = {"x_train": images, "y_train": labels[:, None], "test_images": images[:3], "test_labels": labels[:3]}
    if as_npz:
        np.savez(tmp_path / "set.npz", **found)
    else:
        for name, array in found.items():
            np.save(tmp_path / f"{name}.npy", array)
    source = open_source(str(tmp_path / "set.npz" if as_npz else tmp_path))
    assert (source.kind, source.class_names) == ("arrays", ("0", "1", "2"))
    image = source.splits["train"].image(4)
    assert image.size == (9, 8)
    assert image.mode == ("RGB" if 3 in shape else "L")
    want = images[4].transpose(1, 2, 0) if shape[0] in (1, 3) else images[4]
    assert np.array_equal(np.asarray(image).reshape(want.shape), want)
    divided = source.divided(0.2, 0.2, 0, needed=())
    assert len(divided.splits["test"]) == 3
    assert divided.fingerprint() != source.fingerprint()


def test_numbers_from_0_to_1_and_one_hot_labels(tmp_path: Path) -> None:
    images = pictures(4, 8, 8)
    np.savez(tmp_path / "a.npz", images=(images / 255).astype(np.float32), labels=np.eye(2)[[0, 1, 1, 0]])
    source = open_source(str(tmp_path / "a.npz"))
    assert np.array_equal(pixels_of(source, "train", 3), images[3])
    assert source.splits["train"].labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"x": np.zeros((2, 8, 8), np.uint8)}, "no labels of the train split"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.zeros(3, int)}, "has 2 images but y 3 labels"),
        ({"x": np.zeros((2, 64), np.uint8), "y": np.arange(2)}, "x is 2 x 64 of uint8; images are"),
        ({"x": np.full((2, 8, 8), 300), "y": np.arange(2)}, "values from 300 to 300; allowed is 0 to 255"),
        ({"x": np.full((2, 8, 8), np.nan), "y": np.arange(2)}, "values from nan"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.array([0.5, 1])}, "no whole numbers"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.array([-1, 1])}, "has the label -1"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.array([1, 1])}, "every label in .* is 1"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "images": np.zeros((2, 8, 8), np.uint8)}, "two arrays of train images"),
        ({"x": np.array([{}, {}]), "y": np.arange(2)}, "holds Python objects, not numbers; save it as"),
        ({"weights": np.zeros(3)}, "no array that is called like x_train"),
    ],
)
def test_arrays_that_cannot_be_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], text: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=text):
        open_source(str(tmp_path / "a.npz"))


# ---- CSV ----


def write_csv(path: Path, labels: list[int] | None, side: int = 4, end: str = "\n") -> np.ndarray:
    images = pictures(6 if labels is None else len(labels), side * side)
    head = ["label"] * (labels is not None) + [f"pixel{i}" for i in range(side * side)]
    rows = [[*([labels[i]] if labels is not None else []), *row.tolist()] for i, row in enumerate(images)]
    text = end.join([",".join(head), *(",".join(map(str, row)) for row in rows)]) + end
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return images.reshape(-1, side, side)


@pytest.mark.parametrize(("name", "end"), [("train.csv", "\n"), ("train.csv.gz", "\r\n")])
def test_a_csv_file_of_pixels(tmp_path: Path, name: str, end: str) -> None:
    images = write_csv(tmp_path / name, [0, 1, 2, 1], end=end)
    for data in (tmp_path / name, tmp_path):
        source = open_source(str(data))
        assert (source.kind, source.class_names) == ("csv", ("0", "1", "2"))
        assert source.splits["train"].labels.tolist() == [0, 1, 2, 1]
        assert np.array_equal(pixels_of(source, "train", 3), images[3])


def test_a_test_table_is_a_split_only_with_labels(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [0, 1, 2, 1])
    write_csv(tmp_path / "test.csv", None)
    assert list(open_source(str(tmp_path)).splits) == ["train"]
    write_csv(tmp_path / "test.csv", [2, 1])
    assert open_source(str(tmp_path)).splits["test"].labels.tolist() == [2, 1]
    write_csv(tmp_path / "test.csv", None)
    with pytest.raises(DataError, match=r"test.csv has no column label"):
        open_source(str(tmp_path / "test.csv"))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("1,2,3", "line 3 has 3 values, the header 5 columns"),
        ("1,2,3,4,5,6", "line 3 has 6 values"),
        ("1,2,x,4,5", "line 3: pixel1 is 'x'; allowed are whole numbers from 0 to 255"),
        ("1,2,256,4,5", "line 3: pixel1 is '256'"),
        ("1,2,-1,4,5", "line 3: pixel1 is '-1'"),
        ("1,2,1.5,4,5", "line 3: pixel1 is '1.5'"),
        ("-1,2,1,4,5", "line 3: label is '-1'"),
        ("nan,2,1,4,5", "line 3: label is 'nan'"),
        (",2,1,4,5", "line 3: label is ''"),
        ("", "line 3 is empty, and others follow"),
        ("1,2,\x00,4,5", r"line 3: pixel1 is '\\x00'"),
    ],
)
def test_a_corrupt_line_is_named_by_its_number(tmp_path: Path, line: str, text: str) -> None:
    (tmp_path / "t.csv").write_text(f"label,pixel0,pixel1,pixel2,pixel3\n0,1,2,3,4\n{line}\n1,0,0,0,0\n")
    with pytest.raises(DataError, match=text):
        open_source(str(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "line 1: the columns are"),
        (b"0,1,2,3,4\n", "5 pixel columns are no square image"),
        (b"label,pixel0,pixel1\n0,1,2\n", "2 pixel columns are no square image"),
        (b"label,pixel0\n", "has no line with an image"),
        (b"label,pixel0\n0,\xff\n", "cannot read"),
        (gzip.compress(b"label,pixel0\n0,1\n1,2\n", mtime=0)[:-9], "cannot read"),
        (b"a,b\n1,2\n", "allowed are label,pixel0"),
        (b"7,0,0,0,9\n3,1,1,1,1\n", "line 1: column names repeat .*no header; put the line label,pixel0"),
        (b"0,0,0,9\n1,1,1,1\n", "line 1: column names repeat"),
        ("label,pixel0\n0,1\n".encode("utf-16"), r"cannot read .*: it is no text in UTF-8 \(.*\); save it so"),
    ],
)
def test_other_csv_files_are_refused(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=text):
        open_source(str(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    "head",
    [
        "label,1x1,1x2,2x1,2x2",
        "label,0,1,2,3",
        "Label,pixel1,pixel2,pixel3,pixel4",
        "pixel1,pixel2,pixel3,pixel4,class",
    ],
)
@pytest.mark.parametrize("quote", ["", '"'], ids=["plain", "quoted"])
def test_tables_of_pixels_as_they_are_published(tmp_path: Path, head: str, quote: str) -> None:
    """MNIST by rows and columns, by numbers, of OpenML; programs that put every value in quotes."""
    rows = [[str(value) for value in (i % 3, 10 * i, 10 * i + 1, 10 * i + 2, 10 * i + 3)] for i in range(4)]
    ordered = [row[1:] + row[:1] if head.endswith("class") else row for row in rows]
    lines = [head.split(","), *ordered]
    (tmp_path / "t.csv").write_text("\n".join(",".join(f"{quote}{cell}{quote}" for cell in line) for line in lines))
    source = open_source(str(tmp_path / "t.csv"))
    assert (source.kind, source.class_names) == ("csv", ("0", "1", "2"))
    assert source.splits["train"].labels.tolist() == [0, 1, 2, 0]
    assert pixels_of(source, "train", 3).tolist() == [[30, 31], [32, 33]]


def test_a_csv_file_that_names_images(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(pictures(1, 8, 8, 3, seed=i)[0]))
    table = tmp_path / "labels.csv"
    table.write_text("image,label\n0.png,dog\n1,cat\n2.png,dog\nmissing.png,cat\n")
    source = open_source(str(table))
    assert source.class_names == ("cat", "dog")
    assert source.splits["train"].labels.tolist() == [1, 0, 1]
    assert [skipped.reason for skipped in source.skipped] == ["no such file"]
    table.write_text("image,label\n../0.png,dog\n1.png,cat\n")
    with pytest.raises(DataError, match=r"line 2: '\.\./0.png' is not below the folder"):
        open_source(str(table))
    table.write_text("image,label\n0.png,dog\n1.png\n")
    with pytest.raises(DataError, match="line 3: expected is image,label"):
        open_source(str(table))


# ---- TinyImageNet ----


def test_tiny_imagenet(tmp_path: Path) -> None:
    wnids = ["n02", "n01"]
    (tmp_path / "wnids.txt").write_text("\n".join(wnids) + "\n")
    for wnid in wnids:
        (tmp_path / "train" / wnid / "images").mkdir(parents=True)
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("x")
        for i in range(3):
            (tmp_path / "train" / wnid / "images" / f"{wnid}_{i}.JPEG").write_bytes(png(pictures(1, 8, 8, 3)[0]))
    (tmp_path / "val" / "images").mkdir(parents=True)
    (tmp_path / "val" / "images" / "val_0.JPEG").write_bytes(png(pictures(1, 8, 8, 3)[0]))
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn01\t0\t0\t62\t62\nval_1.JPEG\tn02\t0\t0\t62\t62\n")
    source = open_source(str(tmp_path))
    assert (source.kind, source.class_names) == ("tiny_imagenet", ("n02", "n01"))
    assert source.splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.splits["val"].labels.tolist() == [1]
    assert [skipped.path.name for skipped in source.skipped] == ["val_1.JPEG"]
    annotations.write_text("val_0.JPEG\tn03\n")
    with pytest.raises(DataError, match=r"line 1: .*is not an image's name and one of the 2 numbers"):
        open_source(str(tmp_path))


# ---- WebDataset ----


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def shard(first: int, labels: list[int]) -> dict[str, bytes]:
    members = {}
    for i, label in enumerate(labels, first):
        members |= {f"{i:06}.png": png(pictures(1, 8, 8, 3, seed=i)[0]), f"{i:06}.cls": str(label).encode()}
    return members


def test_webdataset_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", shard(0, [0, 1, 2]))
    write_tar(
        tmp_path / "train-000001.tar",
        shard(3, [2, 0]) | {"9.png": b"", "9.cls": b"1", "8.png": png(pictures(1, 4, 4)[0])},
    )
    write_tar(tmp_path / "val-000000.tar", shard(5, [1]))
    source = open_source(str(tmp_path))
    assert (source.kind, source.class_names) == ("shards", ("0", "1", "2"))
    assert source.splits["train"].labels.tolist() == [0, 1, 2, 2, 0]
    assert np.array_equal(pixels_of(source, "train", 4), pictures(1, 8, 8, 3, seed=4)[0])
    assert np.array_equal(np.asarray(source.splits["train"].take([4, 1]).image(0)), pixels_of(source, "train", 4))
    assert source.splits["val"].labels.tolist() == [1]
    assert sorted(skipped.path.name for skipped in source.skipped) == ["8.png", "9.png"]
    both = source.select("all", 0.0, 0.0, 0)
    assert np.array_equal(np.asarray(both.image(5)), pixels_of(source, "val", 0))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert open_source(str(tmp_path)).class_names == ("a", "b", "c")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"000002.png \(train\) has the label 2; allowed is 0 to 1"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"a.png": b"x", "a.cls": b"one"}, "a.cls is 'one'; it must be a whole number"),
        ({"a.png": b"x", "a.json": b"{"}, "a.json is not JSON"),
        ({"a.png": b"x", "a.json": b'{"label": 1.5}'}, "a label is a whole number or a text"),
        ({"a.png": b"x", "a.jpg": b"x", "a.cls": b"1"}, "two pictures called a"),
        ({"a.png": b"x"}, r"no usable image; 1 unusable file: .*no .cls, .json or .txt"),
    ],
)
def test_shards_that_cannot_be_are_named(tmp_path: Path, members: dict[str, bytes], text: str) -> None:
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(ValueError, match=text):
        open_source(str(tmp_path / "t.tar"))


def test_a_shard_that_is_cut_off_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", shard(0, [0, 1, 2]))
    (tmp_path / "t.tar").write_bytes((tmp_path / "t.tar").read_bytes()[:1600])
    with pytest.raises(DataError, match=r"t\.tar"):
        open_source(str(tmp_path / "t.tar"))
    (tmp_path / "t.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(DataError, match="is no tar file that can be read"):
        open_source(str(tmp_path / "t.tar"))


# ---- Parquet and Arrow ----


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_of_hugging_face(tmp_path: Path, suffix: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    def write(path: Path, labels: list[int], named: bool = True) -> None:
        images = [{"bytes": png(pictures(1, 8, 8, seed=i)[0]), "path": None} for i in range(len(labels))]
        table = pyarrow.table({"image": images, "label": labels})
        if named:
            features = {
                "features": {"image": {"_type": "Image"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}
            }
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": features})})
        path.parent.mkdir(exist_ok=True)
        if suffix == "parquet":
            parquet.write_table(table, path)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)

    if suffix == "parquet":
        train, test = (tmp_path / "data" / f"{name}-00000-of-00001.parquet" for name in ("train", "test"))
    else:
        train, test = (tmp_path / name / "data-00000-of-00001.arrow" for name in ("train", "test"))
    write(train, [0, 1, 1])
    write(test, [1])
    source = open_source(str(tmp_path))
    assert (source.kind, source.class_names) == ("tables", ("a", "b"))
    assert source.splits["train"].labels.tolist() == [0, 1, 1]
    assert source.splits["test"].labels.tolist() == [1]
    assert np.array_equal(pixels_of(source, "train", 2), pictures(1, 8, 8, seed=2)[0])
    write(train, [0, 1, 2])
    with pytest.raises(DataError, match=r"/2 \(train\) has the label 2; allowed is 0 to 1"):
        open_source(str(tmp_path))
    write(train, [0, 1, 2], named=False)
    write(test, [1], named=False)
    assert open_source(str(tmp_path)).class_names == ("0", "1", "2")
    train.write_bytes(train.read_bytes()[:100])
    with pytest.raises(DataError, match=f"cannot be read as {suffix}"):
        open_source(str(tmp_path))


# ---- all kinds ----


def test_kinds_are_found_by_their_files_and_know_their_recipe() -> None:
    assert {"digits", "mnist", "folder", "cifar", "arrays", "csv_table", "tiny_imagenet", "shards", "tables"} <= set(
        formats()
    )
    assert all(found.about for found in formats().values())
    assert list(formats())[-1] == "folder", "which takes any folder, and so is asked last"


def test_a_table_beside_class_folders_is_no_data_set(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(pictures(1, 8, 8)[0]))
    write_csv(tmp_path / "train.csv", [0, 1])
    assert kind_of(str(tmp_path)) == "folder"
    assert class_names(str(tmp_path)) == ["cat", "dog"]


def test_test_images_without_labels_are_left_out(tmp_path: Path) -> None:
    """Hugging Face's test splits have the label -1 everywhere: a test split is drawn from the others."""
    images, labels = np.zeros((8, 8, 8), np.uint8), np.arange(8) % 2
    said: list[str] = []
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=np.full(8, -1))
    source = open_source(str(tmp_path / "a.npz"), report=said.append)
    assert list(source.splits) == ["train"]
    assert [line for line in said if "the test images in" in line and "have no labels (all are -1)" in line]
    np.savez(tmp_path / "b.npz", x_train=images, y_train=labels, x_test=images, y_test=np.array([-1, *labels[1:]]))
    with pytest.raises(DataError, match="-1"):
        open_source(str(tmp_path / "b.npz"))
