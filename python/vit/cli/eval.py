"""`vit eval`: accuracy and loss of a trained model."""

from __future__ import annotations

import argparse

from ..support.files import to_json
from .arguments import count, positive

HELP = "accuracy and loss of a run's kept model, as its training logged them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder of vit train")
    parser.add_argument("--data", help="other images of the same classes (default: those of the run)")
    parser.add_argument(
        "--split",
        choices=("train", "val", "test", "all"),
        help="which images (default: test for the run's own data, all for --data)",
    )
    parser.add_argument("--backend", help="backend of the ops (default: that of the run)")
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="images per forward (default: that of the run)"
    )
    parser.add_argument(
        "--workers", type=count, metavar="N", help="processes that read images (default: that of the run)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    from ..training.run import Run

    run = Run.open(args.run)
    result = run.evaluate(args.split, args.data, args.backend, args.batch_size, args.workers)
    if args.json:
        print(to_json({"accuracy": result.accuracy, "loss": result.loss, "images": result.images}))
    else:
        print(f"accuracy {100 * result.accuracy:.2f} %  loss {result.loss:.4f}  {result.images} images")
    return 0
