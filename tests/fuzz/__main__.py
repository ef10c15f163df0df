"""python -m tests.fuzz: tries inputs and prints the table of figures; exit code 1 unless all of them are good."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from .formats import FORMATS
from .native import NAME as NATIVE
from .native import fuzz as fuzz_native
from .report import GOOD
from .run import fuzz
from .worker import Worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="how long (default: the fixed counts of .ci/run)")
    parser.add_argument("--formats", help=f"of {','.join((*FORMATS, NATIVE))} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that read (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/fuzz"), help="for inputs that fail (default: %(default)s)"
    )
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="one stored input again")
    args = parser.parse_args()
    if args.replay:
        return replay(args.replay)
    names = args.formats.split(",") if args.formats else [*FORMATS, NATIVE]
    if unknown := set(names) - {*FORMATS, NATIVE}:
        parser.error(f"unknown formats {', '.join(sorted(unknown))}")
    python = [name for name in names if name in FORMATS]
    share = len(python) / len(names)
    failed = False
    with tempfile.TemporaryDirectory(prefix="vit-fuzz-") as work:
        if python:
            minutes = args.minutes * share if args.minutes else None
            figures = fuzz(
                Path(work) / "python", args.out, python, args.seed, minutes, args.jobs,
                say=lambda text: print(text, file=sys.stderr),
            )  # fmt: skip
            print(figures.table())
            for failure in figures.failures:
                print(failure)
            failed |= figures.failed()
        if NATIVE in names:
            minutes = args.minutes * (1 - share) if args.minutes else None
            good, text = fuzz_native(Path(work) / "native", args.out, args.seed, minutes)
            print(text)
            failed |= not good
    return 1 if failed else 0


def replay(folder: Path) -> int:
    """Reads one stored input again, and prints how it ends."""
    about = json.loads((folder / "about.json").read_text())
    job = about["job"]
    with tempfile.TemporaryDirectory(prefix="vit-fuzz-") as work:
        from .report import _copy

        path, seed = Path(work) / "input" / about["file"], Path(work) / "seed" / Path(job["seed"]).name
        _copy(folder / about["file"], path)
        _copy(folder / "seed" / seed.name, seed)
        worker = Worker(Path(work) / "worker")
        try:
            outcome, text = worker.run(job | {"path": str(path), "seed": str(seed)})
        finally:
            worker.close()
    print(f"{about['change']}\n{outcome}: {text}")
    return 0 if outcome in GOOD else 1


if __name__ == "__main__":
    sys.exit(main())
