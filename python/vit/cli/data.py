"""`vit data`: what a data set holds, and how fast it is read."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..support.files import to_json, write_text
from ..support.text import printable
from .arguments import count, new_file, positive

HELP = (
    "check a data set once and remember it (index), its statistics and pace (profile), get a published one (download)"
)

SHOWN = 10  # unusable files that are named without --json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("index", "profile", "download"), help="what is done with the data")
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a data set, as vit train --data takes it; of download mnist, fashion_mnist, kmnist, cifar10 or cifar100",
    )
    index = parser.add_argument_group("index")
    index.add_argument("--labels", metavar="FILE", type=new_file, help="write image,label,split of the usable images")
    index.add_argument("--fresh", action="store_true", help="check every file anew, whatever an index says")
    index.add_argument("--verify", action="store_true", help="compare the content of every file with the index")
    profile = parser.add_argument_group("profile")
    profile.add_argument("--model", metavar="NAME", help="size and mode of the images (default: the recipe's model)")
    profile.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="images a batch (default: %(default)s)"
    )
    profile.add_argument("--batches", type=positive, default=50, metavar="N", help="how many (default: %(default)s)")
    profile.add_argument(
        "--workers", type=count, default=0, metavar="N", help="processes that read images (default: %(default)s)"
    )
    profile.add_argument("--augment", metavar="NAME", help="as in vit train (default: none)")
    profile.add_argument(
        "--step",
        action="store_true",
        help="run the model, too, forward and backward: how long does it wait for images?",
    )
    download = parser.add_argument_group("download")
    download.add_argument("--out", metavar="FOLDER", default="data", help="where it goes (default: %(default)s)")
    download.add_argument(
        "--offline", action="store_true", help="only compare the files that are there with the published checksums"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    return {"index": _index, "profile": _profile, "download": _download}[args.what](args)


# ---- index ----


def _index(args: argparse.Namespace) -> int:
    from ..data import open_source
    from ..data.equal import in_words, repeated, shared_with_training
    from ..data.format import path_of
    from ..data.index import Index, Recorder

    began = time.monotonic()
    path = path_of(args.data)
    root = path if path.is_dir() else path.parent
    old = Index.of(root)
    recorder = Recorder(root, None if args.fresh else old, args.verify)
    source = open_source(args.data, report=lambda text: print(printable(text), file=sys.stderr), recorder=recorder)
    written = _write(recorder, old) if recorder.index.entries else None
    if args.labels and source.answers not in ("labels", "label_sets"):
        kind = source.answers.replace("_", " ")
        raise ValueError(f"vit: --labels writes the classes of images, and {args.data} has {kind}; leave it out")
    if args.labels:
        write_text(Path(args.labels), _labels(source))
    shared = shared_with_training(source.splits)
    again = repeated(source.splits["train"]) if list(source.splits) == ["train"] else None
    sizes: list[tuple[int, int]] = [
        (entry.width, entry.height) for entry in recorder.index.entries.values() if not entry.reason
    ]
    found = {
        "data": args.data,
        "kind": source.kind,
        "classes": list(source.class_names),
        "unit": {"masks": "pixels", "key_points": "points"}.get(source.answers, "images"),
        "images": sum(map(len, source.splits.values())),
        "splits": {name: _counts(part, source.class_names) for name, part in source.splits.items()},
        "bad": [{"file": str(item.path), "reason": item.reason} for item in source.skipped],
        "changed": recorder.changed,
        "equal": [dataclasses.asdict(one) for one in [*shared, *([again] if again else [])]],
        "smallest": list(min(sizes, key=math.prod)) if sizes else None,
        "largest": list(max(sizes, key=math.prod)) if sizes else None,
        "digest": recorder.index.digest() if written else source.fingerprint(),
        "index": str(written) if written else None,
        "checked": recorder.checked,
        "cached": recorder.cached,
        "seconds": round(time.monotonic() - began, 3),
    }
    if args.json:
        print(to_json(found))
    else:
        _show_index(found)
        if shared:
            print(f"  {in_words(shared)}")
        if again:
            print(f"  equal pictures: {again} are there more than once; splits drawn from them share pictures")
    for name in recorder.changed:
        print(f"vit: {printable(name)} is not the content of the index, of the same size and time", file=sys.stderr)
    return 1 if recorder.changed else 0


def _write(recorder: Any, old: Any) -> Path:
    """Writes the index: what was looked at now, and what an older one knows of other files that are still there."""
    index = recorder.index
    for name, entry in (old.entries if old else {}).items():
        if name not in index.entries and (index.root / name).is_file():
            index.entries[name] = entry
    path: Path = index.write()
    return path


def _counts(samples: Any, names: Any) -> dict[str, Any]:
    """Images, and of each class its images, its pixels, or its points that are labelled."""
    targets = samples.targets
    if targets is None:
        counts = np.bincount(samples.labels, minlength=len(names)).tolist()
    elif targets.kind == "masks":  # pixels, of which those of no class are above
        masks = (np.asarray(targets.picture(i)) for i in range(len(samples)))
        found = (np.bincount(mask.ravel(), minlength=256) for mask in masks)
        counts = sum(found, np.zeros(256, np.int64))[: len(names)].tolist()
    elif targets.kind == "label_sets":
        counts = targets.there.sum(axis=0).tolist()
    elif targets.kind == "key_points":
        counts = (targets.points[:, :, 2] > 0).sum(axis=0).tolist()
    else:
        counts = [len(samples)] * len(names)
    return {"images": len(samples), "per_class": dict(zip(names, counts, strict=True))}


def _labels(source: Any) -> str:
    """image,label,split; of several classes per image image,labels,split with | between them."""
    text, names, sets = io.StringIO(), source.class_names, source.answers == "label_sets"
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", "labels" if sets else "label", "split"])
    for split, samples in source.splits.items():
        for place, key in enumerate(samples.keys):
            there = samples.targets.there[place].nonzero()[0] if sets else [samples.labels[place]]
            label = "|".join(names[one] for one in there)
            table.writerow([key.encode("utf-8", "backslashreplace").decode(), label, split])
    return text.getvalue()


def _show_index(found: dict[str, Any]) -> None:
    names = found["classes"]
    print(f"{printable(found['data'])} ({found['kind']}): {len(names):,} classes, {found['images']:,} images")
    for split, part in found["splits"].items():
        counts = [number for number in part["per_class"].values() if number]
        spread = f", {min(counts):,} to {max(counts):,} {found['unit']} a class" if counts else ""
        print(f"  {split}: {part['images']:,} images{spread}")
    if found["smallest"]:
        small, large = (" x ".join(map(str, found[key])) for key in ("smallest", "largest"))
        print(f"  sizes (width x height): {small} to {large}")
    bad = found["bad"]
    if bad:
        print(f"  {len(bad):,} unusable files are left out of training:")
        for item in bad[:SHOWN]:
            print(f"    {printable(item['file'])}: {printable(item['reason'])}")
        if len(bad) > SHOWN:
            print(f"    and {len(bad) - SHOWN:,} more (--json has all)")
    if found["index"]:
        known = f"{found['checked']:,} files checked, {found['cached']:,} known before"
        print(f"  index {printable(found['index'])}: {known}")


# ---- download ----


def _download(args: argparse.Namespace) -> int:
    from ..data.download import download

    found = download(args.data, args.out, args.offline)
    if args.json:
        about = {"name": found.name, "data": str(found.data), "files": list(found.files), "downloaded": found.fetched}
        print(to_json(about))
        return 0
    how = "downloaded" if found.fetched else "there already"
    print(f"{found.name}: {how}, {len(found.files)} files as published; next: vit train --data {found.data}")
    return 0


# ---- profile ----


def _profile(args: argparse.Namespace) -> int:
    from .. import tasks
    from ..data import open_source, recipe_of
    from ..factory import create
    from ..training.assembly import augment_of
    from ..training.config import from_mapping
    from ..training.profile import loader_profile

    given = {"data": args.data, "model": args.model, "augment": args.augment or "none"}
    config = from_mapping({k: v for k, v in given.items() if v}, "the command line").resolved(recipe_of(args.data))
    source = open_source(args.data, report=lambda text: print(printable(text), file=sys.stderr))
    if not (samples := source.splits.get("train")):
        raise ValueError(f"vit: {args.data} has no training images, only {' and '.join(source.splits)}")
    task = tasks.get(config.task)
    model = create(config.model, num_classes=len(source.class_names), **task.arch | config.arch)
    model.preprocess = task.prepare(model.preprocess)
    step = _step(model) if args.step else None
    augment = augment_of(config, model)
    found = loader_profile(samples, model.preprocess, augment, args.batch_size, args.workers, args.batches, step)
    size = list(model.preprocess.img_size)
    about = {"data": args.data, "images": len(samples), "model": config.model, "size": size, "workers": args.workers}
    if args.json:
        print(to_json(about | found))
        return 0
    print(f"{printable(args.data)}: {len(samples):,} training images, read as {size[1]} x {size[0]} ({config.model})")
    for name in ("mean", "std", "min", "max"):
        print(f"  {name:<5} {'  '.join(f'{value:.4f}' for value in found[name])}")
    print(f"  {found['images_per_second']:,.0f} images/s with {args.workers} workers")
    if step:
        share = 100 * found["data_share"]
        print(f"  a step takes {found['step_ms']:.1f} ms; {share:.1f} % of the time goes by waiting for images")
    return 0


def _step(model: Any) -> Callable[[Any], object]:
    """Forward and backward of a batch."""

    def step(images: Any) -> None:
        model.train()
        model(images.to(model.device)).float().logsumexp(dim=1).mean().backward()
        model.zero_grad()

    return step
