"""`vit sweep`: many trainings in search of good options."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from ..support.files import to_json
from ..support.stop import when_stopped
from ..support.text import printable
from ..training.config import from_mapping
from .arguments import count, new_file, positive
from .train import add_options, options_given

HELP = "search options and sizes by many trainings (Optuna); a table of accuracy, parameters and latency"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vary",
        nargs="+",
        action="extend",
        metavar="NAME=VALUES",
        help="options of vit train or arguments of the model: a range (lr=1e-4..1e-2, by factors where the ends are "
        "ten times apart) or values (depth=1,2,4)",
    )
    parser.add_argument(
        "--trials", type=positive, metavar="N", help="trainings in all (default: 20; of a grid all of it)"
    )
    parser.add_argument(
        "--sampler",
        choices=("tpe", "random", "grid"),
        default="tpe",
        help="tpe: tree-structured Parzen estimators; random; grid: every combination of values (default: %(default)s)",
    )
    parser.add_argument(
        "--pruner",
        choices=("median", "none"),
        default="median",
        help="median: a trial ends that is below the median of those before it (default: %(default)s)",
    )
    parser.add_argument("--sweep-seed", type=count, default=0, metavar="N", help="of the draws (default: %(default)s)")
    parser.add_argument(
        "--out", metavar="FOLDER", help="the sweep's folder; one that holds a sweep goes on (default: runs/sweep-N)"
    )
    parser.add_argument("--csv", type=new_file, metavar="FILE", help="write the table, anew after each trial")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON; the rest to standard error")
    parser.add_argument("--config", metavar="FILE", help="YAML file of the options below; flags override it")
    parser.add_argument("--recipe", metavar="NAME", help="options to start from (see vit train --list-recipes)")
    add_options(parser.add_argument_group("options of every trial"))


def run(args: argparse.Namespace) -> int:
    from ..data import recipe_of
    from ..support.extras import require
    from ..training import Interrupted
    from ..training.vary import parse

    try:
        varied = parse(args.vary or [])
    except ValueError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    if not varied:
        print("vit: nothing to search; give --vary, for example --vary lr=1e-4..1e-2 depth=1,2,4", file=sys.stderr)
        return 2
    require("optuna", "sweep")
    from ..training.sweep import Plan, Sweep

    config = from_mapping(options_given(args), str(args.config or "the command line"))
    config = config.resolved(recipe_of(config.data))
    trials = args.trials or (sys.maxsize if args.sampler == "grid" else 20)
    plan = Plan(config, varied, trials, args.sampler, args.pruner, args.sweep_seed)
    out = sys.stderr if args.json else sys.stdout
    folder = Path(args.out) if args.out else _new_folder()
    sweep = Sweep(plan, folder, lambda text: print(printable(text), file=out, flush=True))
    print(f"sweep {printable(str(folder))}: {args.sampler}, {' '.join(args.vary)}", file=out, flush=True)
    words = [*sys.argv[1:], *([] if args.out else ["--out", str(folder)])]
    way_out = f"go on with: vit {printable(shlex.join(words))}"
    try:
        with when_stopped(lambda: way_out):
            rows = sweep.run(lambda: sweep.write_csv(Path(args.csv)) if args.csv else None)
    except Interrupted as stop:
        print(f"vit: stopped; {way_out}", file=sys.stderr)
        return stop.exit_code
    if args.csv:
        sweep.write_csv(Path(args.csv))
    return _end(sweep, rows, args.json, out)


def _new_folder() -> Path:
    """runs/sweep-N with the next free number."""
    number = 1
    while os.path.lexists(path := Path("runs") / f"sweep-{number}"):
        number += 1
    return path


def _end(sweep: Any, rows: list[dict[str, Any]], as_json: bool, out: Any) -> int:
    best = sweep.best()
    if best:
        print(
            f"best: trial {best['trial']}, validation {sweep.metric} {100 * best[sweep.metric]:.2f} %, "
            f"{best['parameters']:,} parameters, {best['latency_ms']:.2f} ms an image: {printable(best['run'])}",
            file=out,
        )
    if as_json:
        print(to_json({"sweep": str(sweep.folder), "best": best, "trials": rows}))
    if not best:
        print("vit: no trial was finished; the table says why", file=sys.stderr)
    return 0 if best else 1
