"""`vit info`: what this machine can run."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

HELP = "the backends of this machine and why others are missing; of a model its size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import vit

    environment, backends = versions(), vit.backends()
    if args.json:
        print(json.dumps({"environment": environment, "backends": backends}, default=str))
        return 0
    print("\n".join(f"{key:<10} {value}" for key, value in environment.items()))
    print()
    for name, record in backends.items():
        state = f"yes, on {', '.join(record['devices'])}" if record["available"] else f"no: {record['reason']}"
        print(f"{name:<10} {state}")
        for key, value in record.items():
            if key not in ("available", "devices", "reason", "name") and value:
                print(f"           {key}: {_text(value)}")
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
