"""Folders as people have them: names of splits, what stands beside them, class names, IDX labels; readers that die."""

from __future__ import annotations

import gzip
import os
import signal
import struct
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vit.data import DataError, ReaderError, Samples, kind_of, open_source
from vit.data.folder import folder
from vit.data.idx import read_idx
from vit.data.loader import Images, InOrder, loader
from vit.preprocess import Preprocess

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def images(root: Path, *names: str | bytes, count: int = 2) -> None:
    for name in names:
        path = Path(os.fsdecode(os.fsencode(root) + b"/" + os.fsencode(name)))
        path.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", (4, 4), 40 * i).save(path / f"{i}.png")


def idx_file(path: Path, array: np.ndarray, packed: bool = False) -> None:
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if packed else data)


def mnist(root: Path, labels: list[int], test: list[int] | None = None) -> Path:
    root.mkdir(exist_ok=True)
    for prefix, values in (("train", labels), ("t10k", test)):
        if values is not None:
            idx_file(root / f"{prefix}-labels-idx1-ubyte", np.array(values, np.uint8))
            idx_file(root / f"{prefix}-images-idx3-ubyte", np.zeros((len(values), 4, 4), np.uint8))
    return root


# ---- IDX files by their names ----


@pytest.mark.parametrize("test", ["t10k", "test", "T10K", "Test"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_of_the_test_split_are_read_however_they_are_spelled(tmp_path: Path, test: str, packed: bool) -> None:
    mnist(tmp_path, [0, 1] * 6)
    for name, array in (("images-idx3", np.zeros((2, 4, 4), np.uint8)), ("labels.idx1", np.array([1, 0], np.uint8))):
        idx_file(tmp_path / f"{test}-{name}-ubyte{'.gz' * packed}", array, packed)
    assert open_source(str(tmp_path)).splits["test"].labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "name", ["emnist-letters-test-images-idx3-ubyte.gz", "valid-images-idx3-ubyte", "t10k-labels-idx2-int"]
)
def test_idx_files_that_are_not_read_are_named(tmp_path: Path, name: str) -> None:
    mnist(tmp_path, [0, 1] * 6)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"has {name}, which is none of .*rename it"):
        open_source(str(tmp_path))


def test_idx_files_of_two_test_splits_are_refused(tmp_path: Path) -> None:
    mnist(tmp_path, [0, 1] * 6, [0, 1])
    idx_file(tmp_path / "test-labels-idx1-ubyte", np.zeros(2, np.uint8))
    with pytest.raises(DataError, match=r"both t10k-labels-idx1-ubyte and test-labels-idx1-ubyte; keep one"):
        open_source(str(tmp_path))


def test_idx_files_are_found_where_torchvision_puts_them(tmp_path: Path) -> None:
    """root/MNIST/raw, by the root or the folder between; of two such data sets the root says not which."""
    (tmp_path / "MNIST").mkdir()
    mnist(tmp_path / "MNIST" / "raw", [0, 1] * 6, [1])
    for place in (tmp_path, tmp_path / "MNIST", tmp_path / "MNIST" / "raw"):
        assert (kind_of(str(place)), open_source(str(place)).splits["test"].labels.tolist()) == ("mnist", [1])
    (tmp_path / "KMNIST").mkdir()
    mnist(tmp_path / "KMNIST" / "raw", [0, 1] * 6)
    assert kind_of(str(tmp_path)) == "folder"


# ---- splits ----


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training", "Training"])
@pytest.mark.parametrize("val", ["val", "VAL", "Valid", "Validation", None])
@pytest.mark.parametrize("test", ["test", "Test", "TESTING", None])
def test_split_folders_in_any_case(tmp_path: Path, train: str, val: str | None, test: str | None) -> None:
    for split in filter(None, (train, val, test)):
        images(tmp_path / split, "cat", "dog")
    source = folder(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert list(source.splits) == ["train", *["val"] * bool(val), *["test"] * bool(test)]
    assert all(key.startswith(f"{test}/") for key in source.splits["test"].keys) if test else True


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (["Test/cat", "Test/dog"], r"has Test/ but no train/ to learn from. Allowed: "),
        (["val/cat", "val/dog", "test/cat", "test/dog"], r"has val/ and test/ but no train/"),
        (["train/cat", "train/dog", "Train/cat", "Train/dog"], r"has both Train/ and train/; keep one of them"),
        (["train/cat", "train/dog", "VAL/cat", "Valid/cat"], r"has both VAL/ and Valid/; keep one"),
        (["train/cat", "train/dog", "bird"], r"has train/ and beside it images in bird/: .* a class or a split"),
        (["train/cat", "train/dog", "Test"], r"Test has no class folders, as train/ has"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], r"cat holds test/ and train/, and would be taken for one"),
        (
            ["archive/Train/cat", "archive/Test/cat"],
            r"archive holds Test/ and Train/, .*If it is the data set, give it",
        ),
        (["train/train/cat", "train/train/dog", "train/test/cat"], r"train holds test/ and train/"),
        (["train/cat", "train/dog", "test/cat", "test/Dog"], r"Dog is not a class of .*train; .*\(nearest: dog\)"),
        (["train/cat", "train/dog", "test/bird"], r"test/bird is not a class of .*train"),
        (["train", "test"], r"has test/ and train/, which would be taken for classes. If they are splits, call"),
        (["train_set/cat", "train_set/dog", "test_set/cat", "test_set/dog"], r"has test_set/ and train_set/, which"),
        (["seg_train/seg_train/sea", "seg_test/seg_test/sea", "seg_pred/seg_pred"], r"has seg_test/ and seg_train/"),
        (["train2017", "val2017"], r"has train2017/ and val2017/, which would be taken for classes"),
        (["TrainImages", "TestImages"], r"has TestImages/ and TrainImages/, which would be taken for classes"),
        (["training-data/a", "training-data/b", "holdout/a"], r"has holdout/ and training-data/, which"),
        (
            ["fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog"],
            r"has fold1/ to fold2/, .* with \['cat', 'dog'\] in each",
        ),
        (["Part_0/a", "Part_0/b", "Part_0/c", "Part_1/a", "Part_1/b"], r"has Part_0/ to Part_1/, which"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_layouts_that_could_mean_two_things_are_refused(tmp_path: Path, layout: list[str], text: str) -> None:
    images(tmp_path, *layout)
    with pytest.raises(DataError, match=text):
        folder(tmp_path)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    images(tmp_path, "bus", "car", "train")
    assert folder(tmp_path).class_names == ("bus", "car", "train")


@pytest.mark.parametrize(
    "layout",
    [
        ["fold1", "fold2"],
        ["set1/front", "set1/back", "set2/front"],
        ["cat/a", "cat/b", "dog/a", "dog/b"],
        ["fold1/a", "x/a"],
    ],
    ids=" ".join,
)
def test_folders_with_other_folders_in_them_are_classes(tmp_path: Path, layout: list[str]) -> None:
    images(tmp_path, *layout)
    assert folder(tmp_path).class_names == tuple(sorted({path.split("/")[0] for path in layout}))


def test_some_of_many_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    classes = ("bullet_train", "constrain", "contest", "sea", "ship", "test_tube")
    images(tmp_path, *classes)
    assert folder(tmp_path).class_names == classes


def test_folders_of_operating_systems_are_no_classes(tmp_path: Path) -> None:
    images(tmp_path, "train/cat", "train/dog")
    images(tmp_path, "__MACOSX/train/cat", "train/@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information")
    assert folder(tmp_path).class_names == ("cat", "dog")


def test_folders_without_images_beside_the_splits_are_left_alone(tmp_path: Path) -> None:
    images(tmp_path, "train/cat", "train/dog", ".cache")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").write_text("{}")
    assert folder(tmp_path).class_names == ("cat", "dog")


def test_class_folders_that_are_one_are_refused(tmp_path: Path) -> None:
    images(tmp_path, "cat", "dog")
    (tmp_path / "hound").symlink_to(tmp_path / "dog")
    with pytest.raises(DataError, match=r"class folders .*dog and .*hound are one and the same"):
        folder(tmp_path)
    (tmp_path / "hound").unlink()
    (tmp_path / "again").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"class folder .*again is a link to a folder that holds it"):
        folder(tmp_path)
    (tmp_path / "again").unlink()
    (tmp_path / "again").symlink_to(tmp_path / "again")
    assert folder(tmp_path).class_names == ("cat", "dog"), "a link to itself is no folder"


# ---- names ----


def test_the_same_class_in_two_unicode_spellings(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "äpfel") for form in ("NFC", "NFD"))
    images(tmp_path / "train", composed, "birnen")
    images(tmp_path / "test", apart, "birnen")
    source = folder(tmp_path)
    assert source.class_names == ("birnen", composed)
    assert np.bincount(source.splits["test"].labels).tolist() == [2, 2]
    images(tmp_path / "train", apart)
    with pytest.raises(DataError, match="two folders called äpfel, in two Unicode spellings"):
        folder(tmp_path)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    images(tmp_path, b"cr\xe8me", "tea", count=10)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/tea/\xff.png"))
    Image.new("L", (4, 4)).save(odd)
    source = folder(tmp_path)
    divided = source.divided(0.2, 0.2, 0)
    assert source.class_names == ("cr\udce8me", "tea")
    assert sum(len(part) for part in divided.splits.values()) == 21
    assert divided.fingerprint() == folder(tmp_path).divided(0.2, 0.2, 0).fingerprint()
    odd.write_bytes(b"")
    with pytest.raises(DataError, match=r"tea/\\udcff\.png \(the file is empty\)"):
        folder(tmp_path, "refuse")


def test_data_with_some_of_the_classes_are_counted_by_name(tmp_path: Path) -> None:
    images(tmp_path, "dog", "fox")
    lines: list[str] = []
    source = open_source(str(tmp_path), report=lines.append, classes=["cat", "dog", "emu", "fox"])
    assert np.unique(source.splits["train"].labels).tolist() == [1, 3]
    assert lines == [f"{tmp_path.name} holds 2 of the model's 4 classes: dog, fox"]
    with pytest.raises(DataError, match=r"fox is not a class of the model; .* 'fix'\] \(nearest"):
        open_source(str(tmp_path), classes=["cat", "dog", "fix"])
    only = mnist(tmp_path / "idx", None, [7, 3])  # type: ignore[arg-type]
    assert open_source(str(only), classes=list("0123456789")).splits["test"].labels.tolist() == [7, 3]


# ---- IDX ----


def test_idx_labels_that_begin_at_one_leave_no_empty_class(tmp_path: Path) -> None:
    lines: list[str] = []
    source = open_source(str(mnist(tmp_path, [1, 2, 3, 1], [3, 1])), report=lines.append)
    assert source.class_names == ("1", "2", "3")
    assert source.splits["train"].labels.tolist() == [0, 1, 2, 0]
    assert source.splits["test"].labels.tolist() == [2, 0]
    assert lines == []


def test_idx_labels_with_gaps_are_said(tmp_path: Path) -> None:
    lines: list[str] = []
    source = open_source(str(mnist(tmp_path, [0, 1, 2, 200])), report=lines.append)
    assert source.class_names == ("0", "1", "2", "200")
    assert lines == [f"the labels in {tmp_path} have gaps: 4 classes, 0-2, 200"]


def test_idx_test_labels_that_training_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test images with the label\(s\) \[9\], which training lacks"):
        open_source(str(mnist(tmp_path, [0, 1], [0, 9])))


def test_a_gzip_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    mnist(tmp_path, [0, 1])
    path = tmp_path / "train-images-idx3-ubyte"
    header = path.read_bytes()[:16]
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(header)
        for _ in range(1 << 10):
            file.write(bytes(1 << 20))
    code = (
        "import resource, sys; from pathlib import Path; from vit.data.idx import idx\n"
        "m = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; a = m()\n"
        "try: idx(Path(sys.argv[1]))\n"
        "except ValueError as e: print(e)\n"
        "print((m() - a) // 1024)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert "says 2 x 4 x 4 = 32 bytes, but more follow the header" in out
    assert int(out.split()[-1]) < 50


def test_a_gzip_that_claims_more_than_it_can_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**31, 2**31)))
    with pytest.raises(DataError, match=r"but \d+ bytes of gzip cannot hold so many"):
        read_idx(path, 3)


@pytest.mark.parametrize("change", [lambda d: d[:-9], lambda d: d[:-8] + bytes(8), lambda d: d + b"rubbish"])
def test_damaged_gzip_is_named(tmp_path: Path, change: object) -> None:
    path = tmp_path / "labels.gz"
    idx_file(path, np.arange(200, dtype=np.uint8), packed=True)
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=r"cannot read .*labels\.gz"):
        read_idx(path, 1)


# ---- readers ----


class Ending(Images):
    """Readers that meet the fate `how` at their third image."""

    how = ""

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        if key[1] == 2:
            if self.how == "exit":
                os._exit(3)
            if self.how == "sleep":
                time.sleep(60)
            os.kill(os.getpid(), getattr(signal, self.how))
        return super().__getitem__(key)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("SIGKILL", r"a reader process ended unexpectedly: process \d+ was ended by SIGKILL"),
        ("SIGSEGV", r"a reader process ended unexpectedly: process \d+ was ended by SIGSEGV"),
        ("exit", r"a reader process ended unexpectedly: process \d+ ended with exit code 3"),
        ("sleep", "no reader process gave a batch within 3 s"),
        ("SIGSTOP", r"a reader process does not answer: process \d+ was stopped for 3 s"),
    ],
)
def test_a_reader_that_dies_or_stops_is_an_error(how: str, text: str) -> None:
    dataset = Ending(
        Samples(np.zeros((6, 8, 8), np.uint8), np.zeros(6, np.int64), list("abcdef")), Preprocess(8, in_chans=1)
    )
    dataset.how = how
    batches = loader(dataset, InOrder(6, 1), workers=1, timeout=3.0)
    with pytest.raises(ReaderError, match=text) as caught:
        list(batches)
    assert "(0 reads in the main process)" in str(caught.value)
    assert isinstance(caught.value, DataError)


def test_a_sigterm_to_the_group_leaves_the_readers_to_their_parent() -> None:
    samples = Samples(np.zeros((40, 8, 8), np.uint8), np.zeros(40, np.int64), list(map(str, range(40))))
    batches = iter(loader(Images(samples, Preprocess(8, in_chans=1)), InOrder(40, 1), workers=2))
    next(batches), next(batches)  # one of each: both are set up
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    for pid in children.split():
        subprocess.run(["kill", "-TERM", pid], check=False)  # from another process than their parent
    assert sum(1 for _ in batches) == 38
