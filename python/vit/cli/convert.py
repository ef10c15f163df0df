"""`vit convert`: weights of any layout into timm's, with their architecture and preprocessing beside them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..support.files import to_json
from ..support.text import printable

HELP = "weights of any layout into timm's: model.safetensors and config.json"

EPILOG = """\
IN is a file, a folder (of timm, of transformers, a run), hf-hub:organisation/name, or hf-hub:.../name@revision.
OUT is a folder; timm reads it as local-dir:OUT, and vit.create(weights=OUT) needs no name.

What became of every tensor is printed: mapped, resampled, dropped with the reason, missing. With --json:
  {"output", "config", "report": {"source", "layout", "model", "mapped": [{"from", "to", "how"}],
   "dropped": [{"name", "reason"}], "resampled": [{"name", "from", "to", "rule"}], "missing": [{"name", "instead"}]}}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("weights", metavar="IN", help="any weights that vit.create takes")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument("--model", metavar="NAME", help="model name, for weights that do not know theirs")
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="a name that may be left over, also with *",
    )
    parser.add_argument("--dtype", help="float32, float16, bfloat16 or float64 (default: that of most of the weights)")
    parser.add_argument("--overwrite", action="store_true", help="replace weights that are in OUT already")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from ..factory import create
    from ..weights import read, report, save

    folder = Path(args.output)
    _check_output(folder, args.overwrite)
    checkpoint = read(args.weights, allow=args.allow)
    dtype = args.dtype or _most_common(checkpoint.state)
    model = create(args.model, backend="reference", weights=checkpoint, dtype=dtype, device="cpu", training=False)
    config = save(model, folder)
    if args.json:
        print(to_json({"output": str(folder), "config": config, "report": report(model).to_dict()}))
    else:
        print(report(model))
        print(f"{printable(str(folder))}: model.safetensors, config.json ({config['architecture']}, {dtype})")
    return 0


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"vit: {str(folder)!r} is a file; OUT is a folder")
    there = [name for name in ("model.safetensors", "config.json", "model.json") if (folder / name).exists()]
    if "model.json" in there:
        raise FileExistsError(f"vit: {str(folder)!r} is the folder of a run; write into another one")
    if there and not overwrite:
        raise FileExistsError(f"vit: {str(folder)!r} holds {' and '.join(there)} already; --overwrite replaces them")


def _most_common(state: Mapping[str, Any]) -> str:
    """The dtype of most elements, where models have it, else float32."""
    from ..factory import DTYPES

    counts: dict[str, int] = {}
    for tensor in state.values():
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + tensor.numel()
    most = max(counts, key=lambda name: counts[name], default="float32")
    return most if most in DTYPES else "float32"
