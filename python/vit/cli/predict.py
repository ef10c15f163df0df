"""`vit predict`: the most likely classes of image files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..support.files import to_json
from .arguments import positive

HELP = "the most likely classes of image files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights", metavar="RUN-or-WEIGHTS", help="run folder of vit train, or any weights vit.create takes"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file")
    parser.add_argument("--model", metavar="NAME", help="model name, for weights that do not know theirs")
    parser.add_argument("--top", type=positive, default=5, metavar="K", help="classes per image (default: %(default)s)")
    parser.add_argument("--backend", default="auto", help="backend of the ops (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="images per forward (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import torch

    from ..data import DataError
    from ..data.samples import read_image
    from ..factory import create

    model = create(args.model, backend=args.backend, weights=args.weights, training=False)
    if not model.num_classes:
        raise ValueError(f"vit: {args.weights} has no classifier head, only features: nothing to choose from")
    names = model.class_names or [str(i) for i in range(model.num_classes)]
    answers: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for start in range(0, len(args.images), args.batch_size):
        tensors, paths = [], []
        for path in args.images[start : start + args.batch_size]:
            try:
                tensors.append(model.preprocess(read_image(Path(path))))
                paths.append(path)
            except (DataError, ValueError) as error:
                failed.append({"image": path, "error": str(error)})
        if not tensors:
            continue
        with torch.inference_mode():
            shares = model(torch.stack(tensors).to(model.device, model.dtype)).double().softmax(dim=1).cpu()
        best = shares.topk(min(args.top, shares.shape[1]))
        for path, values, indices in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
            top = [{"class": names[i], "index": i, "probability": p} for p, i in zip(values, indices, strict=True)]
            answers.append({"image": path, "top": top})
    if args.json:
        print(to_json({"predictions": answers, "failed": failed}))
    else:
        for answer in answers:
            print(answer["image"])
            for entry in answer["top"]:
                print(f"  {100 * entry['probability']:6.2f} %  {entry['class']}")
    for failure in failed:
        print(failure["error"], file=sys.stderr)
    if failed:
        print(f"vit: {len(failed)} of {len(args.images)} images could not be read", file=sys.stderr)
    return 1 if failed else 0
