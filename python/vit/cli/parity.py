"""`vit parity`: holds a backend's kernels to the float64 reference, on the machine it is run on."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from ..bench.machine import public
from ..parity.case_list import DTYPES, GPU_DTYPES
from ..parity.problems import DEFINITIONS
from .arguments import device, json_target
from .show import Progress, save_json, table

HELP = "check the kernels of a backend against the float64 reference"

GROUPS = ("regular", "odd", "corner", "large")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs every case of the list (vit.parity.CASES) on a backend: its output and each gradient must lie "
        "within twice the error of PyTorch's own op in that dtype, plus noise, of the float64 reference. "
        "The reference is PyTorch's own ops: what those get wrong themselves is skipped there, and named. "
        "Exit code 0: all passed, 1: a case failed or the backend cannot run here, 2: bad usage."
    )
    parser.add_argument("--backend", default="cpu", help="cpu, cuda, mojo, sycl, reference (default: %(default)s)")
    parser.add_argument("--device", type=device, help="torch device of the inputs (default: the backend's own)")
    parser.add_argument("--op", action="append", choices=tuple(DEFINITIONS), help="only this op (repeatable)")
    parser.add_argument("--group", action="append", choices=GROUPS, help="only this group (repeatable)")
    dtypes = sorted({*DTYPES, *GPU_DTYPES})
    parser.add_argument("--dtype", action="append", choices=dtypes, help="only this dtype (repeatable)")
    parser.add_argument("--direction", choices=("fwd", "bwd"), help="only outputs, or outputs and gradients")
    parser.add_argument("--pattern", metavar="REGEX", help="only cases whose id matches")
    parser.add_argument("--list", action="store_true", help="print the ids of the selected cases and stop")
    text = "verdicts as JSON, to standard output or FILE"
    parser.add_argument("--json", type=json_target, metavar="FILE", nargs="?", const="-", help=text)


def run(args: argparse.Namespace) -> int:
    import torch

    from .. import parity
    from ..backends import get

    try:
        backend = get(args.backend)
        pattern = re.compile(args.pattern) if args.pattern else None
    except (ValueError, re.error) as error:
        print(f"vit parity: {str(error).removeprefix('vit: ')}", file=sys.stderr)
        return 2
    if why := backend.unavailable():
        print(f"vit parity: backend '{args.backend}' cannot be used: {why}", file=sys.stderr)
        return 1
    where = torch.device(args.device) if args.device else backend.default_device()
    cases = parity.cases(
        where.type,
        ops=args.op,
        groups=args.group,
        dtypes=args.dtype,
        directions=[args.direction] if args.direction else None,
        pattern=pattern.pattern if pattern else None,
    )
    if not cases:
        print("vit parity: no case matches; `vit parity --list` prints all ids", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(case.id for case in cases))
        return 0

    ops = parity.backend_ops(args.backend)
    results = []
    out = sys.stderr if args.json == "-" else sys.stdout
    with Progress(len(cases)) as progress:
        for case in cases:
            progress.step(case.id, advance=0)
            result = parity.run(case, ops, where, plain=args.backend == "reference")
            progress.step(case.id)
            results.append(result)
            if not result.ok:
                with progress.aside():
                    kind = "SKIPPED" if result.skipped else "FAILED"
                    print(kind, result.text or case.id, file=out, flush=True)
    failed = sum(not r.ok and not r.skipped for r in results)
    skipped = sum(r.skipped for r in results)
    report = {
        "backend": args.backend,
        "device": str(where),
        "info": public(backend.info()),
        "passed": len(results) - failed - skipped,
        "failed": failed,
        "skipped": skipped,
        "cases": [r.record() for r in results],
    }
    _print_table(results, out)
    print(f"{args.backend} on {where}: {report['passed']} passed, {failed} failed, {skipped} skipped", file=out)
    save_json(report, args.json)
    return 1 if failed else 0


def _print_table(results: list[Any], out: Any) -> None:
    """Per op and dtype: how many passed, and the case that came closest to its bound."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for result in results:
        groups.setdefault((result.case.op, result.case.precision), []).append(result)
    rows = []
    for (op, dtype), group in groups.items():
        worst = max(group, key=lambda r: (not r.skipped, r.ratio))
        rows.append((op, dtype, worst.case.id, f"{sum(r.ok for r in group)}/{len(group)}", f"{worst.ratio:.2f}"))
    columns = ("op", "dtype", "case closest to its bound", "passed", "error/bound")
    table(columns, rows, out, left=3)
