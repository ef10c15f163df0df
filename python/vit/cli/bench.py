"""`vit bench`: models and ops against PyTorch, every candidate in its own process, alternating by rounds."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from vit.testing.problems import DEFINITIONS

HELP = "time models and ops against PyTorch and timm"

#: Not backends, but candidates all the same.
FOREIGN = ("timm", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Times models (images per second) or, with --ops, single ops (GFLOP/s, GB/s, ratio to PyTorch). Every "
        "candidate has its own process; they take turns by rounds while the others idle. Random weights and images; "
        "bfloat16 means bfloat16 weights in inference, float32 weights under autocast in training. "
        "Exit code 0: done, 1: a candidate failed, 2: bad usage."
    )
    parser.add_argument("--models", type=_names, default=["vit_base_patch16_224"], metavar="A,B", help=_DEFAULT)
    parser.add_argument("--batch", type=_numbers, default=[1, 8], metavar="N,M", help=_DEFAULT)
    parser.add_argument(
        "--dtype", type=_dtypes, default=["float32"], metavar="A,B", help="float32, bfloat16, ... " + _DEFAULT
    )
    parser.add_argument(
        "--mode", type=_modes, default=["inference"], metavar="A,B", help="inference, train " + _DEFAULT
    )
    parser.add_argument(
        "--backends",
        type=_names,
        metavar="A,B",
        help="backends, and timm: timm's model, eager (default: reference and every usable backend)",
    )
    parser.add_argument("--device", help="where reference and timm run (default: that of the first native backend)")
    parser.add_argument("--threads", type=int, help="CPU threads of every candidate (default: torch's own choice)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each candidate " + _DEFAULT)
    parser.add_argument("--ops", action="store_true", help="time the ops of the case list instead of models")
    parser.add_argument(
        "--op", action="append", choices=tuple(DEFINITIONS), help="with --ops: only this op (repeatable)"
    )
    parser.add_argument("--direction", choices=("fwd", "bwd"), help="with --ops: only forward or backward")
    parser.add_argument("--pattern", metavar="REGEX", help="with --ops: only cases whose id matches")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-", help="records as JSON, to standard output or FILE"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw the records as a bar chart")


_DEFAULT = "(default: %(default)s)"


def run(args: argparse.Namespace) -> int:
    try:
        jobs = _prepare(args)
    except (ValueError, re.error) as error:
        print(f"vit bench: {error}", file=sys.stderr)
        return 2
    out = sys.stderr if args.json == "-" else sys.stdout
    report: dict[str, Any] = {"environment": environment(args), "records": []}
    try:
        measure = time_ops if args.ops else time_models
        for records in measure(args, jobs, report["environment"]["peak_gflops"]):
            report["records"] += records
            for record in records:
                print(_line(record, records), file=out, flush=True)
    except RuntimeError as error:
        print(f"vit bench: {error}", file=sys.stderr)
        return 1
    finally:
        _save(report, args.json)
    if args.plot:
        plot(report, args.plot)
    return 0


def _prepare(args: argparse.Namespace) -> list[Any]:
    """Fills in what was not given; the jobs to be timed. ValueError for what cannot be run."""
    import torch

    import vit
    from vit import testing
    from vit.backends import NativeBackend, get, records

    usable = [name for name, b in records().items() if isinstance(b, NativeBackend) and b.unavailable() is None]
    if args.backends is None:
        args.backends = usable if args.ops else ["reference", *usable]
    for name in args.backends:
        if name not in FOREIGN and (why := get(name).unavailable()):
            raise ValueError(f"backend '{name}' cannot be used: {why}")
    if "timm" in args.backends and not args.ops:
        _require_timm(args.models)
    if args.device is None:
        native = [name for name in args.backends if name in usable]
        args.device = str(get(native[0]).default_device()) if native else "cpu"
    if args.threads is None:
        args.threads = torch.get_num_threads()
    if args.threads < 1 or args.rounds < 1:
        raise ValueError("--threads and --rounds must be at least 1")
    if not args.ops:
        known = vit.list_models()
        if unknown := [name for name in args.models if name not in known]:
            raise ValueError(f"unknown models {', '.join(unknown)}; `vit info` lists all")
        return [(m, b, d, t) for t in args.mode for m in args.models for d in args.dtype for b in args.batch]
    cases = testing.cases(
        torch.device(args.device).type, ops=args.op, groups=("regular", "large"), dtypes=args.dtype,
        directions=[args.direction] if args.direction else None, pattern=args.pattern,
    )  # fmt: skip
    if not cases:
        raise ValueError("no case of the groups regular and large matches")
    return cases


def time_models(args: argparse.Namespace, jobs: Sequence[Any], peak: Any) -> Any:
    """Yields the records of one (model, batch, dtype, mode) after the other."""
    from vit.testing.candidates import model_step
    from vit.testing.workers import Worker, race

    for model, batch, dtype, mode in jobs:
        workers = [Worker(args.threads) for _ in args.backends]  # fresh ones: their memory is measured
        try:
            candidates = [(b, model, batch, dtype, mode, args.device) for b in args.backends]
            timings = race(workers, model_step, candidates, args.rounds)
            memory = [worker.ask("peak_memory") for worker in workers]
        finally:
            for worker in workers:
                worker.stop()
        yield [
            {
                "model": model, "backend": backend, "dtype": dtype, "batch": batch, "mode": mode,
                "threads": args.threads, "ms_median": 1e3 * timing.median, "ms_min": 1e3 * timing.best,
                "images_per_second": batch / timing.median, "peak_memory_mb": round(peak_bytes / 2**20, 1),
            }
            for backend, timing, peak_bytes in zip(args.backends, timings, memory, strict=True)
        ]  # fmt: skip


def time_ops(args: argparse.Namespace, jobs: Sequence[Any], peak: dict[str, float] | None) -> Any:
    """Yields the records of one case after the other: PyTorch's own op first, then each backend."""
    from vit.testing.candidates import op_step, work
    from vit.testing.workers import Worker, race

    names = ["torch", *(b for b in args.backends if b not in FOREIGN)]
    workers = [Worker(args.threads) for _ in names]
    try:
        for case in jobs:
            timings = race(workers, op_step, [(name, case, args.device) for name in names], args.rounds)
            amount, unit = work(case)
            records = []
            for name, timing in zip(names, timings, strict=True):
                rate = 1e-9 * amount / timing.median
                record = {
                    "id": case.id, "op": case.op, "dtype": case.dtype, "direction": case.direction, "backend": name,
                    "threads": args.threads, "ms_median": 1e3 * timing.median, "ms_min": 1e3 * timing.best,
                    "rate": rate, "unit": unit, "ratio_to_torch": timings[0].median / timing.median,
                }  # fmt: skip
                if peak and unit == "GFLOP/s" and case.dtype in peak:
                    record["percent_of_peak"] = 100 * rate / peak[case.dtype]
                records.append(record)
            yield records
    finally:
        for worker in workers:
            worker.stop()


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """The machine and the software, and its peak: without them a figure means nothing."""
    import torch

    import vit
    from vit.testing.peak import cpu_peak

    found = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vit": vit.__version__,
        "threads": args.threads,
        "rounds": args.rounds,
        "device": args.device,
        "backends": {name: vit.backends()[name] for name in args.backends if name not in FOREIGN},
        "peak_gflops": cpu_peak(args.threads) if args.device == "cpu" else None,
    }
    if "timm" in args.backends:
        import timm

        found["timm"] = timm.__version__
    if args.device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(args.device)
    return found


def _cpu_model() -> str:
    """The processor's name with family and model: virtual machines call Zen 4 and Zen 5 alike "AMD EPYC"."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in file)}
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def _line(record: dict[str, Any], group: list[dict[str, Any]]) -> str:
    """One row of the table; the ratio of a model is to the fastest of timm and the reference."""
    times = f"{record['ms_median']:9.3f} ms  (best {record['ms_min']:9.3f})"
    if "id" in record:
        share = f"  {record['percent_of_peak']:3.0f}% of peak" if "percent_of_peak" in record else ""
        rate = f"{record['rate']:8.1f} {record['unit']}"
        return f"{record['id']:<62} {record['backend']:<9} {times}  {rate}  {record['ratio_to_torch']:5.2f}x{share}"
    what = f"{record['model']} {record['mode']} {record['dtype']} batch {record['batch']}"
    baselines = [r["ms_median"] for r in group if r["backend"] in ("timm", "reference")]
    ratio = f"  {min(baselines) / record['ms_median']:5.2f}x" if baselines else ""
    speed, memory = f"{record['images_per_second']:8.1f} images/s", f"{record['peak_memory_mb']:7.0f} MiB"
    return f"{what:<54} {record['backend']:<9} {times}  {speed}  {memory}{ratio}"


def plot(report: dict[str, Any], path: str) -> None:
    """A bar per record: images per second of models, ratio to PyTorch of ops."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("vit bench: --plot needs matplotlib: pip install 'vit-kernels[bench]'") from None
    records = report["records"]
    ops = bool(records) and "id" in records[0]
    groups = list(dict.fromkeys(_group(r) for r in records))
    names = [n for n in dict.fromkeys(r["backend"] for r in records) if not (ops and n == "torch")]
    value = "ratio_to_torch" if ops else "images_per_second"
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.3 * len(groups) * len(names)), layout="constrained")
    height = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        bars = {_group(r): r[value] for r in records if r["backend"] == name}
        drawn = axes.barh([groups.index(g) + i * height for g in bars], list(bars.values()), height, label=name)
        axes.bar_label(drawn, fmt="%.2f" if ops else "%.1f", padding=3, fontsize=8)
    axes.set_yticks([y + height * (len(names) - 1) / 2 for y in range(len(groups))], groups, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as PyTorch" if ops else "images per second")
    found = report["environment"]
    axes.set_title(f"{found.get('gpu', found['cpu'])}, {found['threads']} threads, torch {found['torch']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _group(record: dict[str, Any]) -> str:
    if "id" in record:
        return record["id"]
    return f"{record['model']}\n{record['mode']} {record['dtype']} batch {record['batch']}"


def _save(report: dict[str, Any], target: str | None) -> None:
    """What was measured is kept even when a later candidate fails."""
    if target == "-":
        print(json.dumps(report))
    elif target:
        with open(target, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


def _require_timm(models: Sequence[str]) -> None:
    try:
        import timm
    except ImportError:
        raise ValueError("the candidate timm needs: pip install 'vit-kernels[bench]'") from None
    if unknown := [name for name in models if not timm.is_model(name)]:
        raise ValueError(f"timm has no model {', '.join(unknown)}: leave timm out of --backends")


def _names(text: str) -> list[str]:
    return [word for word in text.replace(" ", "").split(",") if word]


def _numbers(text: str) -> list[int]:
    numbers = [int(word) for word in _names(text)]
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be positive numbers separated by commas, got {text!r}")
    return numbers


def _one_of(allowed: Sequence[str], text: str) -> list[str]:
    names = _names(text)
    if not names or not set(names) <= set(allowed):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(allowed)}, got {text!r}")
    return names


def _dtypes(text: str) -> list[str]:
    return _one_of(("float32", "bfloat16", "float16", "float64"), text)


def _modes(text: str) -> list[str]:
    return _one_of(("inference", "train"), text)
