"""`vit info`: what this machine can run, and what a model costs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from typing import Any

HELP = "the backends of this machine and why others are missing; with NAME the size of a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="a model, or a wildcard that lists models")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="images per batch (default: %(default)s)")
    parser.add_argument("--backend", default="auto", help="whose memory to count (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.batch < 1:
        print("vit: --batch must be 1 or more", file=sys.stderr)
        return 2
    if args.name is None:
        return _machine(args.json)
    if any(letter in args.name for letter in "*?["):
        return _models(args.name, args.json)
    return _model(args.name, args.batch, args.backend, args.json)


def _machine(as_json: bool) -> int:
    import vit

    environment, backends = versions(), vit.backends()
    if as_json:
        print(json.dumps({"environment": environment, "backends": backends}, default=str))
        return 0
    print("\n".join(f"{key:<10} {value}" for key, value in environment.items()))
    for name, record in backends.items():
        state = f"yes, on {', '.join(record['devices'])}" if record["available"] else f"no: {record['reason']}"
        print(f"\n{name:<10} {state}")
        for key, value in record.items():
            if key not in ("available", "devices", "reason", "name") and value not in (None, "", {}, []):
                print(f"           {key}: {_text(value)}")
    return 0


def _models(pattern: str, as_json: bool) -> int:
    import vit

    names = vit.list_models(pattern)
    if not names:
        print(f"vit: no model is called {pattern!r}; there are {', '.join(vit.list_models())}", file=sys.stderr)
        return 1
    print(json.dumps(names) if as_json else "\n".join(names))
    return 0


def _model(name: str, batch: int, backend: str, as_json: bool) -> int:
    from ..model.size import measure

    size = measure(name, batch, backend)
    if as_json:
        print(json.dumps(asdict(size)))
        return 0
    print(f"{size.name}: {size.parameters:,} parameters, {size.macs / 1e9:,.3f} G multiply-adds per image\n")
    print(f"{'':<24}{'count':>6}{'parameters':>16}{'G multiply-adds':>18}")
    for layers in size.layers:
        print(f"{layers.name:<24}{layers.count:>6}{layers.parameters:>16,}{layers.macs / 1e9:>18,.3f}")
    print(f"\nmemory in MB, float32, batch {size.batch}, backend {size.backend}")
    for text, value in (
        ("weights", size.weights),
        ("inference, beside the weights", size.inference),
        ("kept for the backward", size.activations),
        ("training with AdamW, everything", size.training),
    ):
        print(f"{text:<34}{value / 1e6:>12,.1f}")
    return 0


def versions() -> dict[str, Any]:
    """Software and processor, as results should be quoted with."""
    import torch

    import vit

    return {
        "vit": vit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} logical processors",
    }


def processor() -> str:
    """The processor's model name, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
