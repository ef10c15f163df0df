"""`vit info`: what this machine can run, and what a model costs."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import asdict
from typing import Any

from ..support.extras import interactive
from ..support.files import to_json
from .arguments import positive
from .show import table

HELP = "the backends of this machine and why others are missing; with NAME or NAME.TAG the size of a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="a model, its name or name.tag, or a wildcard that lists them"
    )
    text = "images per batch (default: %(default)s)"
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help=text)
    parser.add_argument("--backend", default="auto", help="whose memory to count (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.name is None:
        return _machine(args.json)
    if any(letter in args.name for letter in "*?["):
        return _models(args.name, args.json)
    return _model(args.name, args.batch, args.backend, args.json)


def _machine(as_json: bool) -> int:
    from ..backends import backends as backends_of_machine

    environment, backends = versions(), backends_of_machine()
    if as_json:
        print(to_json({"environment": environment, "backends": backends}, default=str))
        return 0
    if interactive(sys.stdout):
        table(("this machine", ""), list(environment.items()), sys.stdout, left=2)
        rows = [
            (name, "yes" if record["available"] else "no", "\n".join(_details(record)))
            for name, record in backends.items()
        ]
        table(("backend", "usable", ""), rows, sys.stdout, left=3)
        return 0
    print("\n".join(f"{key:<10} {value}" for key, value in environment.items()))
    for name, record in backends.items():
        state, *details = _details(record)
        print(f"\n{name:<10} {'yes, ' if record['available'] else 'no: '}{state}")
        for line in details:
            print(f"           {line}")
    return 0


def _details(record: dict[str, Any]) -> list[str]:
    """A line for the devices of a backend, or why it cannot be used; then one for each thing known of its build."""
    lines = [f"on {', '.join(record['devices'])}" if record["available"] else str(record["reason"])]
    for key, value in record.items():
        if key not in ("available", "devices", "reason", "name") and value not in (None, "", {}, []):
            lines.append(f"{key}: {_text(value)}")
    return lines


def _models(pattern: str, as_json: bool) -> int:
    from ..model.configs import list_models

    names = list_models(pattern)
    if not names:
        print(f"vit: no model is called {pattern!r}; there are {', '.join(list_models())}", file=sys.stderr)
        return 1
    print(to_json(names) if as_json else "\n".join(names))
    return 0


def _model(name: str, batch: int, backend: str, as_json: bool) -> int:
    from ..bench.cost import measure
    from ..model.configs import resolve

    name = resolve(name)
    size, published = measure(name, batch, backend), _published(name)
    if as_json:
        print(to_json(asdict(size) | published))
        return 0
    print(f"{size.name}: {size.parameters:,} parameters, {size.macs / 1e9:,.3f} G multiply-adds per image\n")
    rows = [(x.name, str(x.count), f"{x.parameters:,}", f"{x.macs / 1e9:,.3f}") for x in size.layers]
    table(("layers", "count", "parameters", "G multiply-adds"), rows, sys.stdout)
    print()
    memory = {
        "weights": size.weights,
        "inference, beside the weights": size.inference,
        "kept for the backward": size.activations,
        "training with AdamW, everything": size.training,
    }
    title = f"memory, float32, batch {size.batch}, backend {size.backend}"
    table((title, "MB"), [(text, f"{value / 1e6:,.1f}") for text, value in memory.items()], sys.stdout)
    print()
    facts = {key: value for key, value in published.items() if key not in ("arch", "preprocess")}
    lines = [(key, _text(value)) for key, value in (facts | published["preprocess"]).items() if value is not None]
    table(("weights", ""), lines, sys.stdout, left=2)
    return 0


def _published(name: str) -> dict[str, Any]:
    """What the tables say of a name or name.tag: the network's arguments, the transform, and where weights are."""
    from ..model.configs import get_config

    config = get_config(name)
    tag, arch = config.tag, dict(config.arch)
    size = arch.get("img_size", 224)
    return {
        "architecture": name.partition(".")[0],
        "tag": tag.tag if tag else None,
        "num_classes": arch.get("num_classes", 1000),
        "input_size": [arch.get("in_chans", 3), size, size],
        "hub": tag.hub if tag else None,
        "license": tag.licence if tag else None,
        "paper": tag.paper if tag else None,
        "preprocess": dict(config.preprocess),
        "arch": arch,
    }


def versions() -> dict[str, Any]:
    """Software and processor, as results should be quoted with."""
    import torch

    from ..bench.machine import processor
    from ..version import __version__

    return {
        "vit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} logical processors",
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
