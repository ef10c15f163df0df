"""`vit runs`: the trainings in a folder, beside each other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..support.files import to_json
from ..support.text import printable
from .arguments import new_file

HELP = "the run folders in a folder: a table of their figures and of the options that differ, or a picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", metavar="FOLDER", nargs="*", help="run folders, or folders with runs below (default: runs)"
    )
    parser.add_argument(
        "--plot", metavar="FILE", type=new_file, help="draw loss and figure of all runs over the epochs (png, pdf, svg)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects, one for each run")


def run(args: argparse.Namespace) -> int:
    from ..training.overview import find_runs, summary

    if args.plot and Path(args.plot).suffix.lower() not in (".png", ".pdf", ".svg"):
        print(f"vit: --plot {printable(args.plot)} must end in .png, .pdf or .svg", file=sys.stderr)
        return 2
    paths = [path for folder in args.folders or ["runs"] for path in find_runs(Path(folder))]
    if not paths:
        raise ValueError(f"vit: there is no run folder of vit train in {', '.join(args.folders or ['runs'])}")
    rows, damaged = [], []
    for path in dict.fromkeys(paths):
        try:
            rows.append(summary(path))
        except (ValueError, OSError) as error:
            damaged.append({"run": str(path), "error": str(error)})
    if args.json:
        print(to_json([*rows, *damaged]))
    else:
        _show(rows)
    for row in damaged:
        print(printable(row["error"]), file=sys.stderr)
    if args.plot and rows:
        _plot(rows, Path(args.plot), sys.stderr if args.json else sys.stdout)
    return 1 if damaged else 0


def _plot(rows: Sequence[dict[str, Any]], target: Path, say: Any) -> None:
    """The runs of the first one's task: figures of different tasks share no axis."""
    from ..training.run import Run
    from ..viz.runs import compare

    metric = rows[0]["metric"]
    chosen = [row for row in rows if row["metric"] == metric]
    compare({printable(row["run"]): Run.open(row["run"]).read_metrics() for row in chosen}, metric, target)
    left = f"; {len(rows) - len(chosen)} runs of other tasks are not in it" if len(chosen) < len(rows) else ""
    print(f"{len(chosen)} run{'s' * (len(chosen) != 1)} drawn into {printable(str(target))}{left}", file=say)


def _show(rows: Sequence[dict[str, Any]]) -> None:
    from ..training.overview import MOST_OPTIONS, described, differing

    if not rows:
        return
    names = differing(rows)
    table = [["run", "model", "state", "epochs", "best", "val", "test", "val loss", "seconds", ""]]
    for row in rows:
        metric = row["metric"]
        table.append(
            [
                printable(row["run"]),
                printable(row["model"]),
                printable(row["state"]),
                f"{row['epochs']}/{row['of_epochs']}",
                "-" if row["best_epoch"] is None else str(row["best_epoch"]),
                _percent(row[f"val_{metric}"]),
                _percent(row[f"test_{metric}"]),
                "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}",
                "-" if row["seconds"] is None else f"{row['seconds']:.0f}",
                printable(described(row, names[:MOST_OPTIONS])),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    if len(names) > MOST_OPTIONS:
        print(f"also different: {', '.join(names[MOST_OPTIONS:])}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"
