"""`vit quantize`: an engine in int8, or with int8 or int4 weights, beside float32, and whether to use it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..support.files import to_json
from .arguments import cosine, new_file, positive, share
from .show import Progress, table

HELP = "make an int8 engine, or one with int8 or int4 weights, and compare it with float32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Quantizes a model to int8, smoothed on training images, and compares it with float32 and bfloat16 on the test "
        "split: the run's own, the one the data brings along, or a fifth of it. "
        "The engine is saved only where it is recommended: within both limits and, where it is for speed, faster than "
        "float32. --weights-only keeps bfloat16 products and stores the weights in 8 or 4 bits, for memory. "
        "Exit code 0: recommended, 1: not recommended or failed, 2: bad usage."
    )
    add = parser.add_argument
    add("weights", metavar="RUN-or-WEIGHTS", help="run folder of vit train, or any weights vit.create takes")
    add("--calibrate", metavar="DATA", required=True, help="digits, a folder of class folders, or MNIST IDX files")
    add("--model", metavar="NAME", help="model name, for weights that do not know theirs")
    add("--images", type=positive, default=128, metavar="N", help="images to calibrate on (default: %(default)s)")
    add("--evaluate", type=positive, default=1000, metavar="N", help="most images to compare on (default: %(default)s)")
    add("--batch-size", type=positive, default=8, metavar="N", help="images per forward (default: %(default)s)")
    add("--weights-only", choices=("int8", "int4"), help="store weights in so many bits, compute in bfloat16")
    add("--exclude", default=None, metavar="A,B", help="layers that stay bfloat16, such as blocks.0.mlp.fc2")
    add("--sensitivity", action="store_true", help="quantize each layer alone and list what that costs")
    add("--max-drop", type=share, default=0.01, help="allowed loss of top-1, as a share (default: %(default)s)")
    add("--min-cosine", type=cosine, default=0.99, help="of the logits with float32's (default: %(default)s)")
    add("--output", type=new_file, metavar="FILE", help="where to save the engine, if recommended")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from ..engine import Engine, quantize
    from ..engine.freeze import check_layers, quantizable
    from ..factory import create

    model = create(args.model, backend="reference", weights=args.weights, dtype="float32", training=False)
    exclude = [name for name in (args.exclude or "").replace(" ", "").split(",") if name]
    check_layers(exclude, len(model.blocks))
    calibrate, images, labels = _images(args, model)

    def quantized(exclude: Sequence[str]) -> Engine:
        if args.weights_only:
            return Engine(model, "bfloat16", exclude=exclude, weights=args.weights_only)
        return Engine(model, "int8", calibrate=calibrate, exclude=exclude)

    engines = [Engine(model), Engine(model, "bfloat16"), quantized(exclude)]
    found = quantize.figures(engines, images, labels, args.batch_size)
    layers: list[tuple[str, float]] = []
    if args.sensitivity:
        with Progress(len(quantizable(len(model.blocks)))) as progress:
            layers = quantize.sensitivity(model, images, args.batch_size, quantized, progress.step)
    for_speed = not args.weights_only
    against = quantize.objections(found[0], found[-1], args.max_drop, args.min_cosine, for_speed)
    if args.output and not against:
        engines[-1].save(args.output)
    report = {
        "model": model.name, "recommended": not against, "objections": against, "images": len(labels),
        "exclude": exclude, "figures": [f.record() for f in found],
        "sensitivity": [{"layer": layer, "cosine": value} for layer, value in layers],
        "file": args.output if args.output and not against else None,
    }  # fmt: skip
    print(to_json(report)) if args.json else _print(report)
    return 1 if against else 0


def _images(args: argparse.Namespace, model: Any) -> tuple[Any, Any, Any]:
    """Training images to calibrate on, test images and their labels to compare on, each spread over its split."""
    import torch

    from ..data import DataError
    from ..data.loader import Images
    from ..support.random import Stream

    source = _source(args)
    if len(source.class_names) != model.num_classes:
        counts = f"{len(source.class_names)} classes, the model {model.num_classes}"
        raise DataError(f"vit: {args.calibrate!r} has {counts}: give data of the model's classes")

    def some(split: str, count: int) -> tuple[Any, Any]:
        dataset = Images(source.splits[split], model.preprocess)
        order = Stream("calibration").permutation(len(source.splits[split]))
        images, labels = zip(*(dataset[(0, int(i))] for i in order[:count]), strict=True)
        return torch.stack(images), torch.tensor(labels)

    return some("train", args.images)[0], *some("test", args.evaluate)


def _source(args: argparse.Namespace) -> Any:
    """The data in splits; for weights of a run folder those of its training, so that no test image was trained on."""
    from ..data import open_source
    from ..training.config import TrainConfig
    from ..training.run import Run

    if (Path(args.weights) / "config.yaml").is_file():
        run = Run.open(args.weights)
        source, config = run.source(args.calibrate), run.config
    else:
        source, config = open_source(args.calibrate), TrainConfig()
    needed = ("train", "test")  # a run keeps "val" for itself: its images are not compared on
    return source.divided(config.val_fraction, config.test_fraction, config.split_seed, needed)


def _print(report: dict[str, Any]) -> None:
    rows = [
        (f["dtype"], f"{100 * f['top1']:.2f} %", f"{f['cosine']:.6f}", f"{f['images_per_second']:.1f}",
         f"{f['weight_bytes'] / 2**20:.1f}")
        for f in report["figures"]
    ]  # fmt: skip
    table((report["model"], "top-1", "cosine", "images/s", "weights MiB"), rows, sys.stdout)
    if report["sensitivity"]:
        layers = [(entry["layer"], f"{entry['cosine']:.6f}") for entry in report["sensitivity"]]
        table(("only this layer quantized", "cosine"), layers, sys.stdout)
    for reason in report["objections"]:
        print(f"not recommended: {reason}")
    if report["recommended"]:
        print("recommended" + (f", saved to {report['file']}" if report["file"] else ""))
    elif report["sensitivity"]:
        print(f"try --exclude {report['sensitivity'][0]['layer']}")
