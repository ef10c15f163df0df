"""`vit train`: a model from images, into a run folder."""

from __future__ import annotations

import argparse
import sys

from ..support.files import to_json
from ..training.config import FIELDS, flag, from_arguments
from ..training.config import add_arguments as add_options

HELP = "train a model on digits (no arguments), a folder of class folders, or MNIST files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file of the options below; flags override it")
    parser.add_argument("--out", metavar="FOLDER", help="the run folder (default: runs/<data>-<number>)")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder, with the options it has")
    parser.add_argument(
        "--json", action="store_true", help="end with one line of JSON; progress goes to standard error"
    )
    add_options(parser.add_argument_group("options"))


def run(args: argparse.Namespace) -> int:
    from ..training import Interrupted, TrainError, train
    from ..training.progress import display

    given = [flag(name) for name in FIELDS if getattr(args, name, None) is not None]
    given += [f"--{name}" for name in ("config", "out") if getattr(args, name)]
    if args.resume and given:
        print(f"vit: --resume goes on with the run's own options; leave out {', '.join(given)}", file=sys.stderr)
        return 2
    show = display(sys.stderr if args.json else sys.stdout)
    try:
        config = None if args.resume else from_arguments(args)
        result = train(config, args.out, args.resume, show)
    except (Interrupted, TrainError) as stop:
        print(stop, file=sys.stderr)
        return 1
    if not result.is_main:
        return 0
    show.line(
        f"test accuracy {100 * result.test.accuracy:.2f} % ({result.test.images} images, loss "
        f"{result.test.loss:.4f}), "
        f"best epoch {result.best_epoch}, {result.seconds:.1f} s"
    )
    show.line(f"next: vit eval {result.run}    vit predict {result.run} IMAGE...")
    if args.json:
        figures = {
            "run": str(result.run),
            "test_accuracy": result.test.accuracy,
            "epochs": result.epochs,
            "seconds": round(result.seconds, 3),
            "backend": result.backend,
        }
        print(to_json(figures))
    return 0
