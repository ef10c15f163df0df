"""Digits, class folders, IDX files: what is read, what is refused, and how it is divided and ordered."""

from __future__ import annotations

import errno
import gzip
import os
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vit.data import DataError, Samples, Source, kind_of, open_source
from vit.data.augment import Affine, CropFlip, Elastic, generator
from vit.data.folder import folder
from vit.data.idx import read_idx
from vit.data.loader import EpochBatches, Images, InOrder, loader
from vit.preprocess import Preprocess

# From Python 3.12 on a fork beside other threads warns; PyTorch's DataLoader forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

GREY = Preprocess((8, 8), in_chans=1)
RGB = Preprocess((16, 16), in_chans=3)
TEST_KEYS = ["9", "11", "15", "20", "24", "26", "27", "29"]


def write_images(root: Path, counts: dict[str, int], size: tuple[int, int] = (20, 24), suffix: str = ".png") -> None:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}{suffix}")


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(root: Path, train: int = 30, test: int = 10, size: int = 28, compress: bool = False) -> None:
    rng = np.random.default_rng(1)
    root.mkdir(exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, size, size), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images", images), ("labels", labels)):
            path = root / f"{prefix}-{kind}-idx{array.ndim}-ubyte{'.gz' if compress else ''}"
            data = idx_bytes(array)
            path.write_bytes(gzip.compress(data) if compress else data)


# ---- digits ----


def test_digits_are_all_there_and_divided_without_overlap() -> None:
    source = open_source("digits")
    assert len(source.splits["train"]) == 1797
    assert source.class_names == tuple("0123456789")
    divided = source.divided(0.1, 0.2, seed=0)
    keys = [set(divided.splits[name].keys) for name in ("train", "val", "test")]
    assert sum(map(len, keys)) == 1797
    assert len(set.union(*keys)) == 1797
    for name, share in (("val", 0.1), ("test", 0.2)):
        counts = np.bincount(divided.splits[name].labels, minlength=10)
        assert counts.min() >= round(share * 174), "each of the ten digits (174 to 183 images) has its share"


def test_splits_depend_on_the_seed_and_on_nothing_else() -> None:
    source = open_source("digits")
    first, again, other = (source.divided(0.1, 0.2, seed) for seed in (0, 0, 1))
    assert first.splits["test"].keys == again.splits["test"].keys
    assert first.fingerprint() == again.fingerprint()
    assert first.splits["test"].keys != other.splits["test"].keys
    # The very images: a change of these would silently change every published figure.
    assert first.splits["test"].keys[:8] == TEST_KEYS


def test_more_images_do_not_move_the_others_between_splits() -> None:
    train = open_source("digits").splits["train"]
    names = tuple("0123456789")
    few = Source("few", "digits", names, {"train": train.take(range(1000))}).divided(0.1, 0.2, 0)
    all_of_them = Source("all", "digits", names, {"train": train}).divided(0.1, 0.2, 0)
    moved = set(few.splits["test"].keys) & set(all_of_them.splits["train"].keys)
    # Only images at the border between two shares move, not a new draw's 80 %.
    assert len(moved) < 0.1 * len(few.splits["test"])


def test_an_empty_split_is_refused() -> None:
    source = open_source("digits")
    with pytest.raises(DataError, match="the val split of digits is empty"):
        source.divided(0.0, 0.2, 0)


def test_a_fraction_of_few_images_is_one_of_each_class() -> None:
    """0.05 of ten images a class is less than half an image of each, and the split was empty."""
    labels = np.arange(40) % 4
    samples = Samples(np.zeros((40, 8, 8), np.uint8), labels, [str(i) for i in range(40)])
    source = Source("few", "arrays", tuple("abcd"), {"train": samples})
    parts = source.divided(0.04, 0.05, 0).splits
    assert {name: np.bincount(part.labels).tolist() for name, part in parts.items()} == {
        "train": [8] * 4, "val": [1] * 4, "test": [1] * 4,
    }  # fmt: skip
    alone = Source("alone", "arrays", ("a", "b"), {"train": samples.take([0, 1, 5])})
    parts = alone.divided(0.1, 0.0, 0, needed=("train",)).splits
    assert {name: len(part) for name, part in parts.items()} == {"train": 2, "val": 1, "test": 0}


def test_missing_data_names_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'.*nowhere' does not exist; allowed: digits, a folder of class folders"):
        kind_of(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file; allowed"):
        kind_of(str(tmp_path / "file"))


# ---- class folders ----


def test_class_folders(tmp_path: Path) -> None:
    write_images(tmp_path, {"dog": 5, "cat": 7})
    source = open_source(str(tmp_path))
    assert source.kind == "folder"
    assert source.class_names == ("cat", "dog")
    assert np.bincount(source.splits["train"].labels).tolist() == [7, 5]
    assert source.splits["train"].image(0).size == (24, 20)


def test_split_folders_are_kept_as_they_are(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        write_images(tmp_path / split, {"a": count, "b": count})
    source = folder(tmp_path)
    assert {name: len(samples) for name, samples in source.splits.items()} == {"train": 12, "val": 4, "test": 6}
    assert source.divided(0.1, 0.2, 0).splits["test"].keys == source.splits["test"].keys


def damage(root: Path) -> list[str]:
    """Puts one file of every kind of damage into class folder a and returns what must be said about each."""
    good = (root / "a" / "000.png").read_bytes()
    (root / "a" / "truncated.png").write_bytes(good[: len(good) // 2])
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "a" / "text.jpg").write_text("not an image")
    (root / "a" / "notes.txt").write_text("not an image")
    (root / "a" / "missing.png").symlink_to(root / "gone.png")
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(root / "a" / "deep.png")
    (root / "a" / ".hidden").write_text("ignored")
    return [
        r"truncated\.png \(.*truncated",
        r"empty\.png \(the file is empty\)",
        r"text\.jpg \(not an image, or none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP\)",
        r"notes\.txt \(not an image by its name\)",
        r"missing\.png \(a link to a file that does not exist\)",
        r"deep\.png \(mode I;16, more than 8 bits",
    ]


def test_unusable_files_are_skipped_named_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    texts = damage(tmp_path)
    source = folder(tmp_path, bad_images="skip")
    assert len(source.splits["train"]) == 6
    assert len(source.skipped) == len(texts)


def test_unusable_files_are_refused_with_every_name(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    texts = damage(tmp_path)
    with pytest.raises(DataError, match="6 unusable files: ") as caught:
        folder(tmp_path, bad_images="refuse")
    for text in texts:
        assert re.search(text, str(caught.value)), text
    assert "hidden" not in str(caught.value)


def test_each_folder_is_read_once_however_links_run(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "a/more": 2, "b": 3})
    write_images(tmp_path.parent / "elsewhere", {"c": 1})
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "twice").symlink_to(tmp_path / "a" / "more")
    (tmp_path / "a" / "linked").symlink_to(tmp_path.parent / "elsewhere")
    source = folder(tmp_path)
    assert np.bincount(source.splits["train"].labels).tolist() == [6, 3]
    assert {item.path.name for item in source.skipped} == {"loop", "up", "twice"}
    assert all("the same folder as" in item.reason for item in source.skipped)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, {"a": 3, "a/closed": 2, "b": 3})
    listed = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"1 unusable file: a/closed \(no permission to read it\)"):
        folder(tmp_path, bad_images="refuse")


def test_header_validation_still_names_files_that_are_no_images(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a" / "text.jpg").write_text("not an image")
    assert [item.path.name for item in folder(tmp_path, validate="header").skipped] == ["text.jpg"]


def test_a_file_that_vanishes_later_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    samples = folder(tmp_path).splits["train"]
    (tmp_path / "a" / "001.png").unlink()
    with pytest.raises(DataError, match=r"cannot read image .*001\.png: no such file"):
        Images(samples, RGB)[0, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_damaged_later_is_named_without_a_traceback(tmp_path: Path, workers: int) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    samples = folder(tmp_path, validate="header").splits["train"]
    path = tmp_path / "a" / "000.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError) as caught:
        list(loader(Images(samples, RGB), InOrder(len(samples), 4), workers))
    assert str(caught.value).startswith(f"vit: cannot read image {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"only": 3}, r"has 1 class folder\(s\) \['only'\]; two or more are needed"),
        ({}, r"has 0 class folder\(s\)"),
        ({"a": 3, "b": 0}, r"no usable training image in class folder\(s\) \['b'\]"),
    ],
)
def test_folders_that_cannot_be_learned_from_are_refused(tmp_path: Path, counts: dict[str, int], text: str) -> None:
    write_images(tmp_path, counts)
    with pytest.raises(DataError, match=text):
        folder(tmp_path)


def test_a_class_unknown_to_the_training_split_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 2, "b": 2})
    write_images(tmp_path / "test", {"a": 1, "c": 1})
    with pytest.raises(DataError, match=r"test/c is not a class of .*train; its classes are \['a', 'b'\]"):
        folder(tmp_path)


def test_two_names_for_one_split_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val", "valid"):
        write_images(tmp_path / split, {"a": 1, "b": 1})
    with pytest.raises(DataError, match="has both val/ and valid/"):
        folder(tmp_path)


# ---- IDX files ----


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzip"])
def test_mnist_files(tmp_path: Path, compress: bool) -> None:
    write_mnist(tmp_path, compress=compress)
    assert kind_of(str(tmp_path)) == "mnist"
    source = open_source(str(tmp_path)).divided(0.2, 0.2, 0)
    assert {name: len(samples) for name, samples in source.splits.items()} == {"train": 20, "test": 10, "val": 10}
    assert source.class_names == tuple("0123456789")
    expected = np.random.default_rng(1).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    first = int(source.splits["train"].keys[0].removeprefix("train-"))
    assert np.array_equal(np.asarray(source.splits["train"].image(0)), expected[first])


def test_mnist_files_spelled_with_a_dot(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert len(open_source(str(tmp_path)).splits["test"]) == 10


IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        (IMAGES, lambda data: data[:-1], r"says 30 x 28 x 28 = 23520 bytes, but 23519 follow the header"),
        (IMAGES, lambda data: data + b"\0", r"but 23521 follow the header"),
        (IMAGES, lambda data: data[:10], r"is cut off inside its header \(10 bytes\)"),
        (IMAGES, lambda data: b"", r"it starts with nothing, expected 00000803"),
        (IMAGES, lambda data: b"\0\0\x0d\x03" + data[4:], r"it starts with 00000d03, expected 00000803"),
        (IMAGES, lambda data: data[:4] + struct.pack(">3I", 30, 2**31, 2**31) + data[16:], "but 23520 follow"),
        (IMAGES, lambda data: idx_bytes(np.zeros((30, 0, 0), np.uint8)), "says its images are 0 x 0 pixels"),
        (IMAGES, lambda data: idx_bytes(np.zeros((29, 28, 28), np.uint8)), "holds 29 images but .* 30 labels"),
        (IMAGES, lambda data: idx_bytes(np.zeros((30, 8, 8), np.uint8)), r"training images are \(8, 8\) and the test"),
        (IMAGES, lambda data: gzip.compress(data)[:-20], r"cannot read .*train-images"),
        (LABELS, lambda data: None, r"lacks train-labels-idx1-ubyte\[\.gz\]"),
    ],
)
def test_damaged_mnist_files_are_named(tmp_path: Path, name: str, change: object, text: str) -> None:
    write_mnist(tmp_path)
    path = tmp_path / name
    data = change(path.read_bytes())  # type: ignore[operator]
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(DataError, match=text):
        open_source(str(tmp_path))


def test_idx_types_other_than_uint8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "floats"
    path.write_bytes(bytes([0, 0, 13, 1]) + struct.pack(">I", 1) + b"\0\0\0\0")
    with pytest.raises(DataError, match="not an IDX file of uint8 with 1 dimension"):
        read_idx(path, 1)


# ---- order, batches, augmentation ----


def test_an_epoch_shows_every_image_once_and_each_epoch_another_order() -> None:
    batches = EpochBatches(100, 8, seed=3)
    orders = []
    for epoch in range(2):
        batches.epoch = epoch
        keys = [key for batch in batches for key in batch]
        assert {key[0] for key in keys} == {epoch}
        orders.append([key[1] for key in keys])
        assert len(set(orders[-1])) == len(orders[-1]) == 96, "12 batches of 8, the remaining 4 are dropped"
    assert orders[0] != orders[1]


def test_an_epoch_can_be_entered_at_any_batch() -> None:
    batches = EpochBatches(100, 8, seed=3)
    whole = list(batches)
    batches.start = 5
    assert list(batches) == whole[5:]


def test_processes_share_an_epoch_without_overlap() -> None:
    ranks = [EpochBatches(100, 8, seed=3, rank=rank, world=2) for rank in range(2)]
    together = EpochBatches(100, 16, seed=3)
    for first, second, both in zip(*ranks, together, strict=True):
        assert len(first) == len(second) == 8
        assert set(first) | set(second) == set(both)
    assert sorted(i for rank in range(3) for batch in InOrder(10, 4, rank, 3) for _, i in batch) == list(range(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_numbers(tmp_path: Path, workers: int) -> None:
    write_images(tmp_path, {"a": 9, "b": 9}, suffix=".jpg")
    samples = folder(tmp_path).splits["train"]
    images = Images(samples, RGB, CropFlip((16, 16)), seed=5)
    batches = EpochBatches(len(samples), 4, seed=5)
    batches.epoch = 3
    got = list(loader(images, batches, workers))
    assert len(got) == 4
    for (pixels, labels), keys in zip(got, batches, strict=True):
        assert torch.equal(pixels, torch.stack([images[key][0] for key in keys]))
        assert labels.tolist() == [int(samples.labels[i]) for _, i in keys]


def test_augmentation_is_a_function_of_seed_epoch_and_image() -> None:
    samples = open_source("digits").splits["train"]
    images = Images(samples, GREY, Affine(), seed=0)
    assert torch.equal(images[1, 7][0], images[1, 7][0])
    assert not torch.equal(images[1, 7][0], images[2, 7][0])
    assert not torch.equal(images[1, 7][0], Images(samples, GREY, Affine(), seed=1)[1, 7][0])
    assert torch.equal(Images(samples, GREY)[1, 7][0], GREY(samples.image(7)))


def test_affine_without_a_range_changes_nothing() -> None:
    image = open_source("digits").splits["train"].image(0)
    still = Affine(rotate=0, shear=0, scale=0, shift=0)(image, generator(0, 0, 0))
    assert still.tobytes() == image.tobytes()


def test_affine_keeps_the_centre_and_moves_by_what_it_says() -> None:
    image = Image.new("L", (33, 33))
    image.putpixel((16, 16), 255)
    for index in range(20):
        turned = np.asarray(Affine(rotate=20, shear=10, scale=0.2, shift=0)(image, generator(0, 0, index)))
        assert turned[16, 16] == turned.max() > 100
        y, x = (np.indices(turned.shape) * turned / turned.sum()).sum(axis=(1, 2))
        assert abs(x - 16) < 0.3
        assert abs(y - 16) < 0.3
    moved = np.asarray(Affine(rotate=0, shear=0, scale=0, shift=0.1)(image, generator(0, 0, 1)))
    y, x = (np.indices(moved.shape) * moved / moved.sum()).sum(axis=(1, 2))
    assert 0.1 < max(abs(x - 16), abs(y - 16)) <= 3.31


def test_a_bend_is_an_affine_change_and_less_than_it_says() -> None:
    """Without a bend the grid gives Affine's pixels, but for the last bits of its coordinates; with it no stroke moves
    further than a knot may."""
    still = Affine(rotate=0, shear=0, scale=0, shift=0)
    image = open_source("digits").splits["train"].image(0).resize((28, 28))
    assert Elastic(still, bend=0.0)(image, generator(0, 0, 0)).tobytes() == image.tobytes()
    plain, bent = Affine(rotate=12), Elastic(Affine(rotate=12), bend=0.0)
    for index in range(10):
        pixels = [np.asarray(change(image, generator(0, 0, index))).astype(int) for change in (plain, bent)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
    dot = Image.new("L", (33, 33))
    dot.putpixel((16, 16), 255)
    places = []
    for index in range(20):
        moved = np.asarray(Elastic(still, bend=0.1)(dot, generator(0, 0, index))).astype(float)
        y, x = (np.indices(moved.shape) * moved / moved.sum()).sum(axis=(1, 2))
        places.append(max(abs(x - 16), abs(y - 16)))
    assert 1.0 < max(places) < 3.3 + 1.0, "a knot moves by 3.3 pixels, and the dot is one wide"
    for side in (1, 2, 3, 5):  # fewer pixels than cells
        assert Elastic()(Image.new("L", (side, side), 9), generator(0, 0, 0)).size == (side, side)


def test_crops_lie_inside_the_image_and_have_the_asked_size() -> None:
    image = Image.new("RGB", (40, 30), (200, 200, 200))
    seen = set()
    for index in range(50):
        crop = CropFlip((12, 16))(image, generator(0, 0, index))
        assert crop.size == (16, 12)
        assert np.asarray(crop).min() == 200, "nothing from outside the image enters"
        seen.add(crop.tobytes())
    tiny = CropFlip((8, 8))(Image.new("RGB", (1, 1)), generator(0, 0, 0))
    assert tiny.size == (8, 8)


def test_half_of_the_crops_are_mirrored() -> None:
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))
    rising = 0
    for index in range(400):
        row = np.asarray(CropFlip((8, 8))(ramp, generator(0, 0, index)))[0].astype(int)
        rising += row[-1] > row[0]
    assert 160 < rising < 240


def test_samples_travel_to_other_processes() -> None:
    images = Images(open_source("digits").splits["train"].take([0, 1]), GREY, Affine())
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(images[0, 1][0], again[0, 1][0])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 images, 1 labels, 2 keys"):
        Samples(np.zeros((2, 8, 8), np.uint8), np.zeros(1, np.int64), ["a", "b"])
