"""`vit viz`: pictures of a model, and of what it does with images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..support.text import printable
from .arguments import count, device, new_file

HELP = "pictures: patches, attention, rollout, position embeddings, patch filters, features"

EPILOG = """\
  patches    images cut into the model's patches
  attention  where one query looks: --query, --layer, --head
  rollout    attention through all layers (arXiv:2005.00928): --query, --fusion, --discard
  posemb     cosine similarity of the position embeddings; reads no image
  filters    principal components of the patch filters; reads no image
  features   principal components of the patch tokens as colours: --layer

MODEL is a name (a network with random weights), a run folder of vit train, or any weights vit.create takes.
A query is class, distillation, register:I, patch:ROW,COLUMN, or pool (the learned query of attention pooling);
for rollout also mean (of the patches).
"""

PICTURES = ("patches", "attention", "rollout", "posemb", "filters", "features")
OF_WEIGHTS = ("posemb", "filters")

#: Options -> the pictures that they belong to, and what they are where not given.
OPTIONS: dict[str, tuple[tuple[str, ...], Any]] = {
    "query": (("attention", "rollout"), "class"),
    "layer": (("attention", "features"), [-1]),
    "head": (("attention",), "all"),
    "fusion": (("rollout",), "mean"),
    "discard": (("rollout",), 0.0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("picture", metavar="PICTURE", choices=PICTURES, help=", ".join(PICTURES))
    add("subject", metavar="MODEL|RUN|WEIGHTS", help="a model's name, a run folder, or weights")
    add("images", metavar="IMAGE", nargs="*", help="image file")
    add("--output", type=_picture_file, metavar="FILE", required=True, help="where to write: .png, .svg or .pdf")
    add("--query", metavar="QUERY", help="whose attention (default: class)")
    add(
        "--layer",
        type=_layers,
        metavar="I,...",
        help="blocks from 0, or all; from the end as --layer=-2,-1 (default: -1)",
    )
    add("--head", type=_heads, metavar="I,...", help="heads from 0, mean or all (default: the mean and all)")
    add("--fusion", choices=("mean", "max", "min"), help="of the heads (default: mean)")
    add("--discard", type=_part, metavar="R", help="share of the smallest entries of a layer left out (default: 0)")
    add("--model", metavar="NAME", help="model name, for weights that do not know theirs")
    add("--img-size", type=_size, metavar="H[xW]", help="size of the images (default: the model's)")
    add("--backend", default="auto", help="backend of the ops (default: %(default)s)")
    add("--device", type=device, help="where the model is (default: the backend's)")


def run(args: argparse.Namespace) -> int:
    if problem := _problem(args):
        print(f"vit: {problem}", file=sys.stderr)
        return 2
    for name, (_, default) in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    from ..data.samples import read_image
    from ..viz.figure import new_figure, save
    from ..viz.queries import QueryError

    new_figure(1, 1)  # a missing matplotlib is found out before the work
    images = [] if args.picture in OF_WEIGHTS else [read_image(Path(path)) for path in args.images]
    if args.images and not images:
        print(f"vit: {args.picture} is a picture of the weights alone; the images are not read", file=sys.stderr)
    try:
        figure = _draw(args, _model(args), images)
    except QueryError as error:
        raise ValueError(str(error).replace("; allowed: ", "; allowed as --query: ")) from error
    save(figure, Path(args.output))
    print(printable(args.output))
    return 0


def _problem(args: argparse.Namespace) -> str | None:
    """What does not go together."""
    for name, (pictures, _) in OPTIONS.items():
        if getattr(args, name) is not None and args.picture not in pictures:
            return f"--{name} goes with {' and '.join(pictures)}, not with {args.picture}"
    if args.picture == "features" and args.layer is not None and (args.layer == "all" or len(args.layer) != 1):
        return "features are those of one --layer"
    if args.query == "pool" and args.layer is not None:
        return "--query pool is of the pooling layer; leave out --layer"
    if not args.images and args.picture not in OF_WEIGHTS:
        return f"no image is given; usage: vit viz {args.picture} MODEL IMAGE... --output FILE"
    return None


def _model(args: argparse.Namespace) -> Any:
    """The named model, or the one of a run folder or of weights."""
    import torch

    from ..factory import create
    from ..model.configs import get_config

    place: dict[str, Any] = {"backend": args.backend, "training": False, "device": args.device}
    if args.img_size is not None:
        place["img_size"] = args.img_size
    subject = args.subject
    if subject.startswith("hf-hub:") or Path(subject).exists():
        return create(args.model, weights=subject, **place)
    try:
        get_config(subject)
    except ValueError as error:
        text = str(error).removeprefix("vit: ")
        raise ValueError(f"vit: there is no file or folder {subject!r}, and as the name of a model: {text}") from None
    if args.model is not None:
        raise ValueError(f"vit: --model {args.model} is for weights, and there is no file or folder {subject!r}")
    if args.picture == "patches" and place["device"] is None and args.backend in ("auto", "reference"):
        with torch.device("meta"):  # no weight takes part: 7 B of them need no memory
            return create(subject, **place)
    print(f"vit: {subject} is a name: its weights are random", file=sys.stderr)
    return create(subject, **place)


def _draw(args: argparse.Namespace, model: Any, images: list[Any]) -> Any:
    import torch

    from .. import viz

    with torch.inference_mode():
        if args.picture == "patches":
            return viz.draw_patches(model, images)
        if args.picture == "attention":
            layers = None if args.layer == "all" else args.layer
            return viz.draw_attention(model, images, layers, args.head, args.query)
        if args.picture == "rollout":
            return viz.draw_rollout(model, images, args.query, args.fusion, args.discard)
        if args.picture == "features":
            return viz.draw_features(model, images, args.layer[0])
        return viz.draw_posemb(model) if args.picture == "posemb" else viz.draw_filters(model)


def _picture_file(text: str) -> str:
    """A file to write whose suffix is a format."""
    from ..viz.figure import SUFFIXES

    suffix = Path(text).suffix
    if suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(SUFFIXES)}, got {text!r}")
    return new_file(text)


def _layers(text: str) -> str | list[int]:
    return "all" if text == "all" else _numbers(text, int, "0,5,-1 or all")


def _heads(text: str) -> str | list[int]:
    return text if text in ("all", "mean") else _numbers(text, count, "0,3, mean or all")


def _numbers(text: str, number: Any, example: str) -> list[int]:
    try:
        return [number(word) for word in text.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"must be like {example}, got {text!r}") from None


def _part(text: str) -> float:
    """A share below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text!r}")
    return value


def _size(text: str) -> int | tuple[int, int]:
    """One side, or height x width."""
    try:
        sides = [int(word) for word in text.split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"must be like 224 or 224x336, got {text!r}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
