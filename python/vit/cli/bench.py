"""`vit bench`: models and ops against PyTorch and other runtimes, each in its own process, alternating by rounds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..bench.peak import cpu_peak
from ..bench.race import Job, Setting, environment, time_models, time_ops
from ..bench.runtimes import RUNTIMES, Arch
from ..parity.problems import DEFINITIONS
from ..support.stop import when_stopped
from . import bench_report
from .arguments import device, json_target, new_file, positive
from .show import Progress, save_json

HELP = "time models and ops against PyTorch, timm, OpenVINO and ONNX Runtime"

#: Lists of a report, and the fields that say what an entry is about.
KEYS = ("model", "id", "dtype", "batch", "mode", "threads")
LISTS = ("records", "refused", "start_up")

DTYPES = ("float32", "bfloat16", "float16", "float64", "int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Times models (images per second) or, with --ops, single ops (GFLOP/s, GB/s, ratio to PyTorch). Every "
        "candidate has its own process; they take turns by rounds while the others idle. Seeded weights with heavy "
        "tails, the same for all candidates, whose logits are compared with the float32 reference. bfloat16 means "
        "bfloat16 weights in inference, float32 weights under autocast in training. "
        "Exit code 0: done, 1: a candidate failed, 2: bad usage."
    )
    add = parser.add_argument
    models = "NAME or NAME:img_size=518:patch_size=14 "
    add("--models", type=_models, default="vit_base_patch16_224", metavar="A,B", help=models + _DEFAULT)
    add("--batch", type=_numbers, default=[1, 8], metavar="N,M", help=_DEFAULT)
    add("--dtype", type=_dtypes, default=["float32"], metavar="A,B", help=f"{', '.join(DTYPES)} " + _DEFAULT)
    add("--mode", type=_modes, default=["inference"], metavar="A,B", help="inference, train " + _DEFAULT)
    add(
        "--backends",
        type=_backends,
        metavar="A,B",
        help=f"backends, {', '.join(RUNTIMES)} (default: reference and every usable backend; --against: engine)",
    )
    add(
        "--against",
        type=_peers,
        metavar="A,B",
        help=f"race the engine against {', '.join(sorted(PEERS))}; one that cannot run is listed with its reason",
    )
    add(
        "--start-up",
        choices=("no", "yes", "only"),
        help="time import, construction and first batch in fresh processes (default: yes with --against, else no)",
    )
    add("--exports", metavar="DIR", help="keep the models made for other runtimes (default: made anew each time)")
    add("--device", type=device, help="where reference and timm run (default: that of the first native backend)")
    add("--threads", type=positive, help="CPU threads of every candidate (default: torch's own choice)")
    add("--rounds", type=positive, default=10, help="turns of each candidate " + _DEFAULT)
    add("--ops", action="store_true", help="time the ops of the case list instead of models")
    add("--op", action="append", choices=tuple(DEFINITIONS), help="with --ops: only this op (repeatable)")
    add("--direction", choices=("fwd", "bwd"), help="with --ops: only forward or backward")
    add("--pattern", metavar="REGEX", help="with --ops: only cases whose id matches")
    text = "records as JSON, to standard output or FILE"
    add("--json", type=json_target, metavar="FILE", nargs="?", const="-", help=text)
    add("--merge", action="store_true", help="keep what FILE of --json holds, except for races that are run again")
    add("--plot", type=new_file, metavar="PNG", help="draw the records as a bar chart")


_DEFAULT = "(default: %(default)s)"

PEERS = frozenset(RUNTIMES) - {"engine"}


def run(args: argparse.Namespace) -> int:
    try:
        jobs, setting = _prepare(args)
        old = _old(args)
    except (ValueError, re.error) as error:
        print(f"vit bench: {str(error).removeprefix('vit: ')}", file=sys.stderr)
        return 2
    if setting.device == "cpu":
        setting = dataclasses.replace(setting, peak=cpu_peak(setting.threads))
    out = sys.stderr if args.json == "-" else sys.stdout
    report: dict[str, Any] = {"environment": environment(setting), "against": args.first, "records": [], "refused": []}

    def save() -> None:
        save_json(_merged(old, report), args.json)

    try:
        with when_stopped(save):
            for found in _measure(args, jobs, setting, out):
                for name, entries in found.items():
                    report.setdefault(name, []).extend(entries)
    finally:  # what was measured is kept even when the rest fails
        save()
    if args.plot:
        bench_report.plot(report, args.plot)
    return 1 if any(entry["failed"] for entry in report["refused"]) else 0


def _measure(
    args: argparse.Namespace, jobs: list[Any], setting: Setting, out: Any
) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Shows and yields one race after the other."""
    turns = 0 if args.start_up == "only" else len(setting.candidates) * (args.rounds + 1)
    with (
        Progress(len(jobs) * turns) as progress,
        tempfile.TemporaryDirectory() as temporary,
        when_stopped(lambda: shutil.rmtree(temporary, ignore_errors=True)),
    ):

        def watch(text: str) -> None:
            progress.step(text, advance=int(text.endswith("warm-up") or ", round " in text))

        models = () if args.ops else time_models(jobs, setting, args.exports or temporary, watch, args.start_up)
        for found in time_ops(jobs, setting, watch) if args.ops else models:
            with progress.aside():
                bench_report.show(found, args.first, out)
            yield found


def _prepare(args: argparse.Namespace) -> tuple[list[Any], Setting]:
    """Fills in what was not given; the jobs to be timed. ValueError for what cannot be run."""
    import torch

    from .. import parity
    from ..backends import NativeBackend, get, records

    if args.ops and args.against:
        raise ValueError("--against compares whole models: leave out --ops")
    usable = [name for name, b in records().items() if isinstance(b, NativeBackend) and b.unavailable() is None]
    default = usable if args.ops else ["engine"] if args.against else ["reference", *usable]
    backends = default if args.backends is None else args.backends
    for name in backends:
        if name not in RUNTIMES and (why := get(name).unavailable()):
            raise ValueError(f"backend '{name}' cannot be used: {why}")
    if args.start_up is None:
        args.start_up = "yes" if args.against else "no"
    args.first = backends[0] if args.against else None
    native = [name for name in backends if name in usable]
    where = args.device or (str(get(native[0]).default_device()) if native else "cpu")
    candidates = [*backends, *(name for name in args.against or () if name not in backends)]
    if args.ops:
        candidates = [name for name in candidates if name not in RUNTIMES]
    setting = Setting(tuple(candidates), where, args.threads or torch.get_num_threads(), args.rounds)
    if not args.ops:
        _check_models(args.models, candidates)
        return [
            Job(model, arch, dtype, batch, mode)
            for mode in args.mode
            for model, arch in args.models
            for dtype in args.dtype
            for batch in args.batch
        ], setting
    cases = parity.cases(
        torch.device(where).type, ops=args.op, groups=("regular", "large"), dtypes=args.dtype,
        directions=[args.direction] if args.direction else None, pattern=args.pattern,
    )  # fmt: skip
    if not cases:
        raise ValueError("no case of the groups regular and large matches")
    return cases, setting


def _check_models(models: Sequence[tuple[str, Any]], candidates: Sequence[str]) -> None:
    from ..model.configs import list_models

    known = list_models()
    if unknown := [name for name, _ in models if name not in known]:
        raise ValueError(f"unknown models {', '.join(unknown)}; `vit info '*'` lists all")
    if set(candidates) <= {"engine"} or not PEERS & set(candidates):
        return
    try:
        import timm
    except ImportError:
        raise ValueError("comparing with other runtimes needs: pip install 'vit-kernels[bench]'") from None
    if unknown := [name for name, _ in models if not timm.is_model(name)]:
        raise ValueError(f"timm, whose model the other runtimes run, has no {', '.join(unknown)}")


def _old(args: argparse.Namespace) -> dict[str, Any] | None:
    """The report that --merge adds to."""
    if not args.merge:
        return None
    if args.json in (None, "-"):
        raise ValueError("--merge needs --json FILE")
    path = Path(args.json)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """`new` with the races of `old` that were not run again: all candidates of a race were timed side by side."""
    if old is None:
        return new
    merged = dict(new)
    raced = {_race(entry) for entry in new["records"]}
    for name in LISTS:
        again = {_race(entry) for entry in new.get(name, ())} | (raced if name == "refused" else set())
        kept = [entry for entry in old.get(name, ()) if _race(entry) not in again]
        if kept or name in new:
            merged[name] = [*kept, *new.get(name, ())]
    return merged


def _race(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(key) for key in KEYS)


def _names(text: str) -> list[str]:
    return [word for word in text.replace(" ", "").split(",") if word]


def _models(text: str) -> list[tuple[str, Arch]]:
    """ "a,b:img_size=518" -> [("a", ()), ("b", (("img_size", 518),))]."""
    models = []
    for word in _names(text):
        name, *settings = word.split(":")
        pairs = [setting.partition("=")[::2] for setting in settings]
        if not all(key.isidentifier() and value.isdigit() for key, value in pairs):
            raise argparse.ArgumentTypeError(f"must be like vit_base_patch16_224:img_size=518, got {word!r}")
        models.append((name, tuple((key, int(value)) for key, value in pairs)))
    if not models:
        raise argparse.ArgumentTypeError("must name a model, got none")
    return models


def _backends(text: str) -> list[str]:
    if not (names := _names(text)):
        raise argparse.ArgumentTypeError("must name a backend, got none")
    return names


def _numbers(text: str) -> list[int]:
    words = _names(text)
    numbers = [int(word) for word in words if word.isdecimal()]
    if not numbers or len(numbers) < len(words) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be positive numbers separated by commas, got {text!r}")
    return numbers


def _one_of(allowed: Sequence[str], text: str) -> list[str]:
    names = _names(text)
    if not names or not set(names) <= set(allowed):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(allowed)}, got {text!r}")
    return names


def _dtypes(text: str) -> list[str]:
    return _one_of(DTYPES, text)


def _modes(text: str) -> list[str]:
    return _one_of(("inference", "train"), text)


def _peers(text: str) -> list[str]:
    return _one_of(sorted(PEERS), text)
