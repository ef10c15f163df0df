"""`vit eval`: accuracy and loss of a trained model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..support.files import to_json
from ..support.text import printable
from . import classes
from .arguments import count, positive

MOST_CONFUSED = 100  # classes up to which --json holds the confusion matrix

HELP = "accuracy and loss of a run's kept model, as its training logged them, or of any weights on --data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN-or-WEIGHTS", help="run folder of vit train, or any weights vit.create takes, with --data"
    )
    parser.add_argument(
        "--data", help="other images of the same classes, or of some of them, by name (default: those of the run)"
    )
    parser.add_argument(
        "--split",
        choices=("train", "val", "test", "all"),
        help="which images (default: test for the run's own data, all for --data)",
    )
    parser.add_argument("--model", metavar="NAME", help="model name, for weights that do not know theirs")
    parser.add_argument(
        "--arch",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="arguments of vit.create that differ from the named model, for weights (img_size=98)",
    )
    parser.add_argument("--task", metavar="NAME", help="what the model has learned (default: that of the run)")
    classes.add_argument(parser)
    parser.add_argument("--backend", help="backend of the ops (default: that of the run; auto for weights)")
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="images per forward (default: that of the run; 32 for weights)"
    )
    parser.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="processes that read images (default: that of the run; 0 for weights)",
    )
    parser.add_argument(
        "--crops",
        type=int,
        choices=(1, 5, 10, 144),
        default=1,
        help="views of each image, whose answers are averaged: corners and centre (5), mirrored (10), of four sizes "
        "and three squares (144) (default: %(default)s)",
    )
    parser.add_argument("--flip", action="store_true", help="each view mirrored too")
    parser.add_argument(
        "--average",
        choices=("logits", "probabilities"),
        default="logits",
        help="what is averaged over the views (default: %(default)s)",
    )
    parser.add_argument("--knn", type=positive, metavar="K", help="also: accuracy of the K nearest training images")
    parser.add_argument("--probe", action="store_true", help="also: accuracy of a linear classifier on the features")
    parser.add_argument(
        "--corrupt",
        nargs="+",
        action="extend",
        metavar="KIND",
        help="also: accuracy on images that are noisy, blurred, pale ...: kinds of ImageNet-C, or all",
    )
    parser.add_argument(
        "--severity",
        nargs="+",
        type=int,
        choices=(1, 2, 3, 4, 5),
        default=[3],
        help="how much they are corrupted (default: 3)",
    )
    parser.add_argument(
        "--seed", type=count, default=0, metavar="N", help="of the noise of --corrupt (default: %(default)s)"
    )
    parser.add_argument(
        "--draw",
        metavar="FOLDER",
        help="write the pictures that a training leaves: confusion and calibration, masks ...",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON; progress goes to standard error")


#: Options that say something of a class alone.
_OF_CLASSES = ("crops", "flip", "knn", "probe", "corrupt")


def _wrong_options(args: argparse.Namespace, task: str) -> str:
    """What is said of options that go with one class per image where the task is another; "" where there are none."""
    given = [f"--{name}" for name in _OF_CLASSES if getattr(args, name)]
    given = [name for name in given if name != "--crops" or args.crops > 1]
    wrong = given and task != "classification"
    return f"vit: {', '.join(given)}: with --task classification alone, not with {task}" if wrong else ""


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model on samples. `train`: reads the training images of the same data."""

    model: Any
    names: Sequence[str]
    samples: Any
    train: Callable[[], Any]
    batch_size: int
    workers: int
    threads: int | str | None = None
    task: str = "classification"


def run(args: argparse.Namespace) -> int:
    from ..training.corruptions import CORRUPTIONS
    from ..training.evaluate import cpu_threads

    subject_of = _run if (Path(args.run) / "config.yaml").is_file() or not _is_weights(args.run) else _weights
    if subject_of is _run and (args.model or args.arch or args.class_names):
        print(
            "vit: a run folder knows its model and classes; leave out --model, --arch and --class-names",
            file=sys.stderr,
        )
        return 2
    if subject_of is _weights and not args.data:
        print(f"vit: {printable(args.run)} is no run folder and has no data; give images with --data", file=sys.stderr)
        return 2
    if args.task and (wrong := _wrong_options(args, args.task)):
        print(wrong, file=sys.stderr)
        return 2
    if args.corrupt and (unknown := [kind for kind in args.corrupt if kind not in ("all", *CORRUPTIONS)]):
        print(f"vit: --corrupt has no {printable(unknown[0])}; it has all, {', '.join(CORRUPTIONS)}", file=sys.stderr)
        return 2
    if args.draw:
        Path(args.draw).mkdir(parents=True, exist_ok=True)
    subject = subject_of(args)
    with cpu_threads(subject.threads):
        figures = _figures(args, subject) | _corrupted(args, subject) | _on_features(args, subject)
    if args.json:
        print(to_json(figures))
    else:
        _show(figures, subject.task)
    return 0


def _figures(args: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """The figures of the classifier; of a model without one the number of images alone."""
    from .. import tasks
    from ..tasks.classification import confusion_counts, per_class, wilson
    from ..training.evaluate import evaluate
    from ..training.views import Views

    model, names = subject.model, subject.names
    figures: dict[str, Any] = {"images": len(subject.samples), "classes": len(names)}
    if not model.num_classes:
        return figures
    if subject.task != "classification":
        task = tasks.get(subject.task)
        found = evaluate(model, subject.samples, subject.batch_size, subject.workers, task=task)
        _draw(args, task, found, subject)
        return figures | task.figures(found) | {"per_class": task.details(found, names)}
    views = Views(model.preprocess, args.crops, args.flip) if args.crops > 1 or args.flip else None
    result = evaluate(model, subject.samples, subject.batch_size, subject.workers, views=views, average=args.average)
    _draw(args, tasks.get("classification"), result, subject)
    figures |= {
        "accuracy": result.accuracy,
        "interval": wilson(result.accuracy, result.images),
        "top5": result.top5,
        "ece": result.ece,
        "loss": result.loss,
        "calibration": [
            {"images": images, "confidence": sure, "accuracy": share} for images, sure, share in result.bins
        ],
        "per_class": per_class(result, names),
    }
    if len(names) <= MOST_CONFUSED:
        figures["confusion"] = confusion_counts(result, len(names))
    return figures


def _draw(args: argparse.Namespace, task: Any, found: Any, subject: Subject) -> None:
    """The picture of an evaluation, in the folder of --draw."""
    if args.draw:
        target = Path(args.draw) / f"{task.picture_name}.png"
        task.picture(found, subject.names, [target], subject.model, subject.samples)


def _corrupted(args: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """Accuracy and loss on corrupted images, of each kind and severity of --corrupt, and the mean accuracy."""
    if not args.corrupt:
        return {}
    from ..training.corruptions import CORRUPTIONS, Corrupted
    from ..training.evaluate import evaluate

    model = subject.model
    if not model.num_classes:
        raise ValueError("vit: --corrupt needs a classifier, and the weights have none")
    kinds = args.corrupt
    if "all" in kinds:
        kinds = [kind for kind in CORRUPTIONS if model.preprocess.in_chans > 1 or kind != "saturate"]
    rows = []
    for kind in dict.fromkeys(kinds):
        for severity in sorted(set(args.severity)):
            show = Corrupted(model.preprocess, kind, severity, args.seed)
            found = evaluate(model, subject.samples, subject.batch_size, subject.workers, show=show)
            rows.append({"kind": kind, "severity": severity, "accuracy": found.accuracy, "loss": found.loss})
    return {"corruptions": rows, "corrupted_accuracy": sum(row["accuracy"] for row in rows) / len(rows)}


def _on_features(args: argparse.Namespace, subject: Subject) -> dict[str, float]:
    """Accuracies that need no classifier of the model's own."""
    if not (args.knn or args.probe):
        return {}
    from ..training.features import features, knn_accuracy, probe_accuracy

    train, test = subject.train(), subject.samples
    found = (features(subject.model, part, subject.batch_size, subject.workers) for part in (train, test))
    data = (next(found), train.labels, next(found), test.labels)
    figures = {"knn_accuracy": knn_accuracy(*data, args.knn)} if args.knn else {}
    return figures | ({"probe_accuracy": probe_accuracy(*data)} if args.probe else {})


def _show(figures: dict[str, Any], task: str) -> None:
    if task != "classification" and "loss" in figures:
        from .. import tasks

        print(f"{tasks.get(task).describe(figures, figures['images'])}, {figures['images']} images")
        for row in figures["per_class"]:
            (share,) = (value for key, value in row.items() if key != "class")
            print(f"  {printable(row['class'])}: {'not there' if share is None else f'{100 * share:.2f} %'}")
    elif "accuracy" in figures:
        low, high = figures["interval"]
        print(
            f"accuracy {100 * figures['accuracy']:.2f} %  loss {figures['loss']:.4f}  {figures['images']} images\n"
            f"95 % interval {100 * low:.1f} to {100 * high:.1f} %, top-5 {100 * figures['top5']:.2f} %, "
            f"calibration error {100 * figures['ece']:.2f} %"
        )
        worst = [row for row in figures["per_class"] if row["images"]]
        worst.sort(key=lambda row: row["recall"])
        shown = ", ".join(f"{printable(row['class'])} {100 * row['recall']:.1f} %" for row in worst[:5])
        print(f"lowest of the classes: {shown}")
    for row in figures.get("corruptions", ()):
        print(f"{row['kind']}, severity {row['severity']}: {100 * row['accuracy']:.2f} %  loss {row['loss']:.4f}")
    for name, text in (("knn_accuracy", "nearest neighbours"), ("probe_accuracy", "linear probe")):
        if name in figures:
            print(f"{text}: {100 * figures[name]:.2f} %")


def _is_weights(source: str) -> bool:
    from ..weights.read import HUB

    path = Path(source).expanduser()
    return source.startswith(HUB) or path.is_file() or (path.is_dir() and not (path / "config.yaml").exists())


def _run(args: argparse.Namespace) -> Subject:
    from ..training.run import Run

    run = Run.open(args.run)
    names, config = run.model["class_names"], run.config
    task = str(config.task or "classification")
    if args.task not in (None, task):
        raise ValueError(f"vit: {args.run} was trained for {task}, not for {args.task}")
    if wrong := _wrong_options(args, task):
        raise ValueError(wrong)
    if run.edited():
        print(
            f"vit: {printable(str(run.path / 'config.yaml'))} was changed after the training: the figures may not be "
            "of the images that the training left out",
            file=sys.stderr,
        )
    if args.data is None:
        _say(args, f"{len(names)} classes, the {args.split or 'test'} images of {config.data}")
        samples = run.samples(args.split, None)
    else:
        samples = _samples(args, names, config.bad_images, config.validate, config)
    return Subject(
        model=run.load(args.backend),
        names=names,
        samples=samples,
        train=lambda: run.samples("train", None),
        batch_size=args.batch_size or config.batch_size or 1,
        workers=config.workers if args.workers is None else args.workers,
        threads=config.threads,
        task=task,
    )


def _weights(args: argparse.Namespace) -> Subject:
    from .. import data, tasks
    from ..factory import create
    from ..training.config import TrainConfig
    from .train import parse_arch

    arch = tasks.get(args.task).arch | parse_arch(args.arch or [])
    model = create(args.model, backend=args.backend or "auto", weights=args.run, training=False, **arch)
    by_features = args.knn or args.probe
    if not model.num_classes and not by_features:
        raise ValueError(f"vit: {args.run} has no classifier head, only features: --knn K or --probe evaluates these")
    found = data.class_names(args.data)
    names = classes.folder_names(model, args.class_names, found) if model.num_classes else found
    config = TrainConfig()
    if by_features and args.split is None:
        args.split = "test"  # "all" would hold the training images
    return Subject(
        model=model,
        names=names,
        samples=_samples(args, names, "skip", "decode", config),
        train=lambda: data.open_source(args.data, classes=names).select(
            "train", config.val_fraction, config.test_fraction, config.split_seed
        ),
        batch_size=args.batch_size or 32,
        workers=args.workers or 0,
        task=args.task or "classification",
    )


def _samples(args: argparse.Namespace, names: Any, bad_images: str, validate: str, config: Any) -> Any:
    """The images of --data with labels counted in `names`, and a line about them."""
    from ..data import open_source
    from ..data.folder import describe

    source = open_source(args.data, bad_images, validate, lambda text: _say(args, text), classes=names)
    if source.skipped:
        _say(args, f"skipped {describe(source.skipped, Path(args.data))}")
    samples = source.select(
        args.split or "all", config.val_fraction or 0.0, config.test_fraction or 0.0, config.split_seed
    )
    _say(args, f"{len(names)} classes, {len(samples):,} images of {printable(args.data)} ({args.split or 'all'})")
    return samples


def _say(args: argparse.Namespace, text: str) -> None:
    print(printable(text), file=sys.stderr if args.json else sys.stdout, flush=True)
