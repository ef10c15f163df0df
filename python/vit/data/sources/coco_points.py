"""Key points as COCO writes them: JSON files with images, annotations and categories, and the images they name.

A folder with annotations/person_keypoints_train2017.json and train2017/, or with images/ and a JSON file whose name has
"keypoints" or "pose" in it, or that file itself. Each annotation with a labelled point is a sample: the part of its
picture inside its box, a quarter larger. Others of the same picture are samples of their own, of the same split.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...support.images import open_image, opened, upright_size
from ...support.records import Record, RecordError, read_regular, shown
from ...support.text import printable
from ..folder import check_of, describe, examined
from ..format import Format, Request, path_of
from ..layout import split_word
from ..points import OF_BOX, key_points
from ..samples import DataError, Samples, Skipped, Source
from ..stored import Stored

MOST_BYTES = 1 << 30  # of a JSON file: those of COCO 2017 have 240 MB
LARGER = 1.25  # so much larger than its box is the part of the picture that is shown, as in ViTPose
_WORDS = ("keypoint", "key_point", "key-point", "pose")


@dataclass(frozen=True)
class _Person:
    """An annotation that can be used: points [K, 3] and box (left, top, right, bottom) in pixels of the picture."""

    path: Path
    points: np.ndarray
    box: tuple[float, float, float, float]
    area: float
    size: tuple[int, int]

    def window(self) -> tuple[int, int, int, int]:
        """The part of the picture that is shown, in whole pixels."""
        left, top, right, bottom = self.box
        across, down = (LARGER - 1) / 2 * (right - left), (LARGER - 1) / 2 * (bottom - top)
        width, height = self.size
        low = max(0, math.floor(left - across)), max(0, math.floor(top - down))
        return (*low, min(width, math.ceil(right + across)), min(height, math.ceil(bottom + down)))


class Parts:
    """Parts of image files, one for each person."""

    def __init__(self, paths: Sequence[Path], windows: Sequence[tuple[int, int, int, int]]) -> None:
        self.paths, self.windows = list(paths), list(windows)

    def picture(self, index: int) -> Image.Image:
        part = open_image(self.paths[index]).crop(self.windows[index])
        part.info["origin"] = self.windows[index][:2]  # from which `vit predict` counts
        return part

    def name(self, index: int) -> str:
        return f"image {self.paths[index]}"

    def digest(self) -> bytes:
        return hashlib.sha256(repr([(path.name, *window) for path, window in self._all()]).encode()).digest()

    def _all(self) -> Any:
        return zip(self.paths, self.windows, strict=True)


def _files(data: str) -> list[Path]:
    """The JSON files that `data` stands for, by their names alone."""
    root = path_of(data)
    if root.suffix.lower() == ".json":
        return [root] if root.is_file() else []
    if not root.is_dir():
        return []
    found = [path for base in (root, root / "annotations") if base.is_dir() for path in sorted(base.glob("*.json"))]
    return [path for path in found if any(word in path.stem.lower() for word in _WORDS)]


def coco_points(data: str, request: Request) -> Source:
    """The data set that `data` names. Annotations that cannot be, and pictures that cannot be read, are left out and
    named, or refused as the request says; those without a labelled point and of crowds do not count. Raises DataError
    for a file that is none of COCO's key points."""
    root, files = path_of(data), _files(data)
    if root.is_file():
        root = root.parent.parent if root.parent.name == "annotations" else root.parent
    check = check_of(request.validate, root, request.recorder)
    skipped: list[Skipped] = []
    names: list[str] = []
    pairs: Any = None
    people: dict[str, list[_Person]] = {}
    marks: dict[Path, int] = {}
    for path in files:
        split = split_word(path.stem) or "train"
        if split in people:
            raise DataError(
                f"vit: {root} has two files of key points for {split}, one is {path.name}; keep one of them"
            )
        values = _read(path)
        category, own, pairs = _category(values, path)
        if names and own != names:
            raise DataError(f"vit: {path} has the key points {own}, {files[0].name} has {names}")
        names = own
        images = _images(values, path, root, skipped)
        places = sorted({place for place, _ in images.values()})
        reasons, found = examined(places, check, len(places), request.report)
        why = dict(zip(places, reasons, strict=True))
        marks |= dict(zip(places, found.tolist(), strict=True))
        skipped += [Skipped(place, reason) for place, reason in why.items() if reason]
        usable = {key: value for key, value in images.items() if not why[value[0]]}
        people[split] = _people(values, path, category, names, usable, set(images) - set(usable), skipped)
    if skipped and request.bad_images == "refuse":
        raise DataError(f"vit: {describe(skipped, root)}. Remove them, or use --bad-images skip")
    if not any(people.values()):
        raise DataError(f"vit: {root} has no usable annotation with a labelled key point; {describe(skipped, root)}")
    classes = list(request.classes or names)
    if missing := [name for name in names if name not in classes]:
        raise DataError(f"vit: {root} has the key points {missing}, the model has {classes}")
    splits = {split: _samples(root, found, names, classes, pairs, marks) for split, found in people.items()}
    return Source(root.resolve().name, "coco_points", tuple(classes), splits, tuple(skipped))


def _samples(
    root: Path, people: list[_Person], names: list[str], classes: list[str], pairs: Any, marks: dict[Path, int]
) -> Samples:
    """The samples of a split, their points in the order of the classes."""
    keys = [one.path.relative_to(root).as_posix() if one.path.is_relative_to(root) else one.path.name for one in people]
    windows = [one.window() for one in people]
    points = np.zeros((len(people), len(classes), 3))
    order = [classes.index(name) for name in names]
    for place, (one, window) in enumerate(zip(people, windows, strict=True)):
        points[place, order] = one.points - (*window[:2], 0) * (one.points[:, 2:] > 0)
    boxes = np.array([(one.box[2] - one.box[0], one.box[3] - one.box[1]) for one in people]).reshape(-1, 2)
    moved = None if pairs is None else [(order[a], order[b]) for a, b in pairs]
    targets = key_points(points, np.array([one.area for one in people]), boxes, classes, moved)
    images = Stored.of(Parts([one.path for one in people], windows), len(people))
    of_people = np.array([marks[one.path] for one in people], np.uint64)
    return Samples(images, np.zeros(len(people), np.int64), keys, targets, of_people)


def _read(path: Path) -> Record:
    try:
        found = Record(json.loads(read_regular(path, MOST_BYTES)), str(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"vit: cannot read key points: {str(error).removeprefix('vit: ')} ({path})") from error
    for key in ("images", "annotations", "categories"):
        values = found.raw(key, None)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise DataError(f"vit: {path} is no file of COCO: {key} must be a list of objects")
    return found


def _category(values: Record, path: Path) -> tuple[int, list[str], Any]:
    """Number, names of the points, and flip pairs (None: by the names) of the category with key points."""
    found = [category for category in values.raw("categories") if category.get("keypoints")]
    if len(found) != 1:
        names = [str(category.get("name")) for category in found]
        raise DataError(f"vit: {path} has {len(found)} categories with key points {names}; one is needed")
    try:
        record = Record(found[0], f"{path}, category {shown(found[0].get('name'))}")
        names = list(record.texts("keypoints"))
        pairs = record.raw("flip_pairs", None)
        whole = isinstance(pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair) for pair in pairs
        )
        if pairs is not None and not whole:
            record.refuse("flip_pairs", "a list of pairs of numbers of key points, from 0")
        if len(set(names)) < len(names):
            record.refuse("keypoints", "different names")
        return record.integer("id"), names, pairs
    except RecordError as error:
        raise DataError(str(error)) from error


def _images(values: Record, path: Path, root: Path, skipped: list[Skipped]) -> dict[int, tuple[Path, Any]]:
    """Number -> file and (width, height) of each image, as the JSON file says."""
    split = path.stem.rpartition("_")[2]
    bases = (root / "images" / split, root / split, root / "images", root)
    found: dict[int, tuple[Path, Any]] = {}
    for image in values.raw("images"):
        number, name = image.get("id"), image.get("file_name")
        if type(number) is not int or number in found:
            skipped.append(Skipped(path, f"image {shown(number)}: its id must be a whole number of its own"))
        elif not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            skipped.append(Skipped(path, f"image {number}: file_name {shown(name)} is no file in the folder"))
        else:
            place = next((base / name for base in bases if (base / name).is_file()), bases[2] / name)
            found[number] = place, (image.get("width"), image.get("height"))
    return found


def _people(
    values: Record,
    path: Path,
    category: int,
    names: list[str],
    images: dict[int, tuple[Path, Any]],
    unreadable: set[int],
    skipped: list[Skipped],
) -> list[_Person]:
    """The annotations that can be used."""
    known = {one.get("id") for one in values.raw("categories")}
    sizes: dict[int, tuple[int, int]] = {}
    found = []
    for annotation in values.raw("annotations"):
        number = annotation.get("image_id")
        if number in unreadable or (annotation.get("category_id") in known - {category}) or annotation.get("iscrowd"):
            continue
        try:
            if annotation.get("category_id") != category:
                raise ValueError(f"category {shown(annotation.get('category_id'))} is unknown")
            if type(number) is not int or number not in images:
                raise ValueError(f"image {shown(number)} is unknown")
            if number not in sizes:
                sizes[number] = _size(*images[number])
            person = _person(annotation, images[number][0], sizes[number], names)
        except (ValueError, OSError) as error:
            text = f"annotation {shown(annotation.get('id'))}: {error}"
            skipped.append(Skipped(images[number][0] if number in images else path, text))
            continue
        if person:
            found.append(person)
    return found


def _size(path: Path, said: tuple[Any, Any]) -> tuple[int, int]:
    with opened(path) as image:
        size = upright_size(image)
    if said not in ((None, None), size):
        raise ValueError(f"the image is {size[0]} x {size[1]}, the file says {said[0]} x {said[1]}")
    return size


def _person(annotation: dict[str, Any], path: Path, size: tuple[int, int], names: list[str]) -> _Person | None:
    """The annotation; None without a labelled point. ValueError says what of it cannot be."""
    values = annotation.get("keypoints")
    if not isinstance(values, list) or len(values) != 3 * len(names):
        count = len(values) if isinstance(values, list) else shown(values)
        raise ValueError(f"{count} numbers of key points; {len(names)} points have {3 * len(names)}")
    points = np.array(_finite("keypoints", values)).reshape(-1, 3)
    for name, (x, y, seen) in zip(names, points.tolist(), strict=True):
        if seen not in (0, 1, 2):
            raise ValueError(f"{name} has the visibility {seen:g}; 0, 1 and 2 are allowed")
        if seen and not (0 <= x <= size[0] and 0 <= y <= size[1]):
            raise ValueError(f"{name} at ({x:g}, {y:g}) is outside of the image, {size[0]} x {size[1]}")
    labelled = points[points[:, 2] > 0]
    if not len(labelled):
        return None
    if annotation.get("bbox") is None:
        (left, top), (right, bottom) = labelled[:, :2].min(axis=0), labelled[:, :2].max(axis=0)
        left, top, right, bottom = left - 0.5, top - 0.5, right + 0.5, bottom + 0.5  # one point has an area, too
    else:
        box = _finite("bbox", annotation["bbox"])
        if len(box) != 4 or min(box[2:]) <= 0:
            raise ValueError(f"bbox is {shown(box)}; left, top, width and height are needed")
        left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    inside = max(0.0, left), max(0.0, top), min(float(size[0]), right), min(float(size[1]), bottom)
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise ValueError(f"bbox {shown(annotation['bbox'])} is outside of the image, {size[0]} x {size[1]}")
    (area,) = _finite("area", [annotation.get("area") or OF_BOX * (right - left) * (bottom - top)])
    if area <= 0:
        raise ValueError(f"area is {area:g}; it must be above 0")
    return _Person(path, points, (left, top, right, bottom), area, size)


def _finite(name: str, values: Any) -> list[float]:
    """The numbers; ValueError names the first that is none."""
    if not isinstance(values, list):
        raise ValueError(f"{name} is {shown(values)}; a list of numbers is needed")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} has {printable(shown(value))}, which is no number")
    return [float(value) for value in values]


FORMAT = Format(
    about="key points in COCO's JSON (pose)",
    recognizes=lambda data: bool(_files(data)),
    open=coco_points,
    recipe=lambda data: "key_points",
    rank=30,
)
