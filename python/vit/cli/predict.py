"""`vit predict`: the most likely classes of image files."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from ..support.files import replacing, to_json
from ..support.text import printable
from . import answers as answered
from . import classes
from .arguments import json_target, new_file, positive
from .submission import submission

Item = tuple[str, Callable[[], Any]]  # the name of an image, and what reads it

TOP = 5  # classes that are told

HELP = "the most likely classes of image files, of all images in folders, or of a data set"

EPILOG = """\
Images are turned as their EXIF orientation says, transparent ones put on white; of animations the first picture counts.

--csv writes a line per image, in the order they were given:
  image,class,index,probability,class_2,index_2,probability_2,...,error
--json prints one object:
  {"predictions": [{"image", "top": [{"class", "index", "probability"}]}], "failed": [{"image", "error"}]}
A prediction of another task has "shares" of the classes (segmentation), "points" with x, y in pixels of the picture and
confidence, and "box" (pose), or "nearest", "median" and "farthest" (depth); "files" are those that --draw wrote.

An image that cannot be read is named on standard error and does not stop the others; the exit code is then 1.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "weights", metavar="RUN-or-WEIGHTS", help="run folder of vit train, or any weights vit.create takes"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="image file, or folder of images, also below it")
    parser.add_argument("--data", metavar="DATA", help="in place of images: a CSV file of pixels, or any data set")
    parser.add_argument(
        "--submission", metavar="FILE", type=new_file, help="write ImageId,Label, as Kaggle's Digit Recognizer takes it"
    )
    parser.add_argument("--task", metavar="NAME", help="what the model has learned (default: that of the run)")
    parser.add_argument(
        "--draw",
        "--masks",
        metavar="FOLDER",
        help="of masks, key points and depths: write what the model answers, and the image under it, as PNG files",
    )
    parser.add_argument("--model", metavar="NAME", help="model name, for weights that do not know theirs")
    parser.add_argument(
        "--top", type=positive, metavar="K", help=f"classes per image, or lines (default: {TOP} classes, all lines)"
    )
    classes.add_argument(parser)
    parser.add_argument("--backend", default="auto", help="backend of the ops (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="images per forward (default: %(default)s)"
    )
    parser.add_argument("--csv", type=json_target, metavar="FILE", help="write a CSV file (- for standard output)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from .. import tasks
    from ..factory import create

    if args.json and args.csv == "-":
        print("vit: --json and --csv - both write to standard output; give --csv a file", file=sys.stderr)
        return 2
    if bool(args.images) == bool(args.data):
        problem = "both images and --data are given" if args.data else "neither images nor --data are given"
        print(f"vit: {problem}; usage: vit predict RUN IMAGE... or vit predict RUN --data DATA", file=sys.stderr)
        return 2
    failed: list[dict[str, Any]] = []
    if args.data:
        items = _data(args.data)
    else:
        paths, failed = _images(args.images)
        items = [(path, partial(_read, path)) for path in paths]
    name = answered.task_of(args.weights, args.task)
    task = tasks.get(name)
    if args.draw if task.answer is None else (args.csv or args.submission):
        wrong = "--draw" if task.answer is None else "--csv and --submission"
        print(f"vit: the model was trained for {name}, with which {wrong} does not go", file=sys.stderr)
        return 2
    model = create(args.model, backend=args.backend, weights=args.weights, training=False, **task.arch)
    if task.answer is not None:
        return answered.run(args, task, model, items, failed)
    if not model.num_classes:
        raise ValueError(f"vit: {args.weights} has no classifier head, only features: nothing to choose from")
    names = classes.class_names(model, args.class_names)
    top = min(args.top or TOP, model.num_classes)
    answers: list[dict[str, Any]] = []
    count = 0
    quiet = args.csv or args.submission
    with _table(args.csv, top) as write_row, submission(args.submission, names) as write_label:
        for answer in _answers(model, items, args.batch_size, top, names):
            count += 1
            write_row(answer)
            write_label(answer)
            if "error" in answer:
                failed.append(answer)
            elif args.json:
                answers.append(answer)
            elif not quiet:
                _show(answer)
    if args.json:
        print(to_json({"predictions": answers, "failed": failed}))
    elif args.csv and args.csv != "-":
        print(f"{count} images -> {printable(args.csv)}")
    if args.submission and not args.json and args.csv != "-":
        print(f"{count} images -> {printable(args.submission)}")
    for failure in failed:
        print(printable(failure["error"]), file=sys.stderr)
    if failed:
        print(f"vit: {len(failed)} of {max(count, len(args.images))} images could not be read", file=sys.stderr)
    return 1 if failed else 0


def _images(given: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The files among the arguments and below its folders, and a failure for each folder without images."""
    from ..data.folder import images_below

    paths, failed = [], []
    for name in given:
        if not Path(name).is_dir():
            paths.append(name)
            continue
        found, skipped = images_below(Path(name))
        paths += map(str, found)
        if skipped:
            text = f"{len(skipped)} files are no images by their names, or unreadable; left out"
            print(f"vit: {printable(name)}: {text}", file=sys.stderr)
        if not found:
            failed.append({"image": name, "error": f"vit: cannot read image {name}: is a folder without images"})
    return paths, failed


def _read(path: str) -> Any:
    from ..data.samples import read_image

    return read_image(Path(path))


def _data(data: str) -> list[Item]:
    """The images of a data set, whose labels are not looked at; a table of pixels needs none."""
    import numpy as np

    from ..data import Samples, kind_of, open_source
    from ..data.sources.csv_table import is_pixel_table, read_pixels

    if kind_of(data) == "csv_table" and is_pixel_table(path := Path(data).expanduser()):
        images = read_pixels(path).images
        samples = Samples(images, np.zeros(len(images), np.int64), [str(i) for i in range(1, len(images) + 1)])
    else:
        samples = Samples.concatenate(list(open_source(data, bad_images="refuse").splits.values()))
    return [(str(key), partial(samples.image, i)) for i, key in enumerate(samples.keys)]


def _answers(
    model: Any, items: list[Item], batch_size: int, top: int, names: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Per image, in order, its most likely classes or its error."""
    import torch

    for start in range(0, len(items), batch_size):
        chosen = items[start : start + batch_size]
        answers: list[dict[str, Any]] = [{"image": name} for name, _ in chosen]
        tensors = []
        for answer, (_, image) in zip(answers, chosen, strict=True):
            try:
                tensors.append(model.preprocess(image()))
            except (ValueError, MemoryError) as error:
                answer["error"] = str(error) or f"vit: not enough memory for {answer['image']}"
        if tensors:
            with torch.inference_mode():
                shares = model(torch.stack(tensors).to(model.device, model.dtype)).double().softmax(dim=1).cpu()
            best = shares.topk(top)
            found = iter(zip(best.values.tolist(), best.indices.tolist(), strict=True))
            for answer in answers:
                if "error" not in answer:
                    answer["top"] = [
                        {"class": names[i], "index": i, "probability": p} for p, i in zip(*next(found), strict=True)
                    ]
        yield from answers


def _show(answer: dict[str, Any]) -> None:
    print(printable(answer["image"]))
    for entry in answer["top"]:
        print(f"  {100 * entry['probability']:6.2f} %  {printable(entry['class'])}")


@contextmanager
def _table(target: str | None, top: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a function that writes an answer as a line of CSV; a file is replaced when all lines are there."""
    fields = ("class", "index", "probability")
    text_of = _plain if target == "-" and sys.stdout is not None and sys.stdout.isatty() else _utf8
    header = [f"{field}_{place}" if place > 1 else field for place in range(1, top + 1) for field in fields]

    def row(answer: dict[str, Any]) -> list[Any]:
        cells = [entry[field] for entry in answer.get("top", ()) for field in fields] or [""] * len(header)
        return [text_of(cell) for cell in (answer["image"], *cells, answer.get("error", ""))]

    if not target:
        yield lambda answer: None
    elif target == "-":
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(["image", *header, "error"])
        yield lambda answer: table.writerow(row(answer))
    else:
        place = Path(target)
        special = place.exists() and not place.is_file()  # a device or a pipe is written to, not replaced
        with (
            nullcontext(place) if special else replacing(place) as path,
            open(path, "w", encoding="utf-8", newline="") as file,
        ):
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["image", *header, "error"])
            yield lambda answer: table.writerow(row(answer))


def _utf8(cell: Any) -> Any:
    r"""The cell; bytes of a file name that are not UTF-8 as \udc.. escapes, so that the file is UTF-8."""
    return cell.encode("utf-8", "backslashreplace").decode() if isinstance(cell, str) else cell


def _plain(cell: Any) -> Any:
    """The cell with its control characters as escapes: for a terminal, which would obey them."""
    return printable(cell) if isinstance(cell, str) else cell
