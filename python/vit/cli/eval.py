"""`vit eval`: accuracy and loss of a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..support.files import to_json
from ..support.text import printable
from . import classes
from .arguments import count, positive

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
    parser.add_argument("--json", action="store_true", help="print one line of JSON; progress goes to standard error")


def run(args: argparse.Namespace) -> int:
    evaluate = _run if (Path(args.run) / "config.yaml").is_file() or not _is_weights(args.run) else _weights
    if evaluate is _run and (args.model or args.class_names):
        print("vit: a run folder knows its model and classes; leave out --model and --class-names", file=sys.stderr)
        return 2
    if evaluate is _weights and not args.data:
        print(f"vit: {printable(args.run)} is no run folder and has no data; give images with --data", file=sys.stderr)
        return 2
    names, result = evaluate(args)
    figures = {"accuracy": result.accuracy, "loss": result.loss, "images": result.images, "classes": len(names)}
    if args.json:
        print(to_json(figures))
    else:
        print(f"accuracy {100 * result.accuracy:.2f} %  loss {result.loss:.4f}  {result.images} images")
    return 0


def _is_weights(source: str) -> bool:
    from ..weights.read import HUB

    path = Path(source).expanduser()
    return source.startswith(HUB) or path.is_file() or (path.is_dir() and not (path / "config.yaml").exists())


def _run(args: argparse.Namespace) -> tuple[Any, Any]:
    from ..training.evaluate import cpu_threads, evaluate
    from ..training.run import Run

    run = Run.open(args.run)
    names, config = run.model["class_names"], run.config
    if run.edited():
        print(
            f"vit: {printable(str(run.path / 'config.yaml'))} was changed after the training: the figures may not be "
            "of the images that the training left out",
            file=sys.stderr,
        )
    if args.data is None:
        _say(args, f"{len(names)} classes, the {args.split or 'test'} images of {config.data}")
        return names, run.evaluate(args.split, None, args.backend, args.batch_size, args.workers)
    samples = _samples(args, names, config.bad_images, config.validate, config)
    workers = config.workers if args.workers is None else args.workers
    with cpu_threads(config.threads):
        model = run.load(args.backend)
        return names, evaluate(model, samples, args.batch_size or config.batch_size or 1, workers)


def _weights(args: argparse.Namespace) -> tuple[Any, Any]:
    from .. import data
    from ..factory import create
    from ..training.config import TrainConfig
    from ..training.evaluate import evaluate

    model = create(args.model, backend=args.backend or "auto", weights=args.run, training=False)
    if not model.num_classes:
        raise ValueError(f"vit: {args.run} has no classifier head, only features: nothing to evaluate")
    names = classes.folder_names(model, args.class_names, data.class_names(args.data))
    samples = _samples(args, names, "skip", "decode", TrainConfig())
    return names, evaluate(model, samples, args.batch_size or 32, args.workers or 0)


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
