"""How `vit bench` shows its records: a line each in a pipe, tables on a terminal, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from ..support.extras import interactive, require
from .show import table

Record = dict[str, Any]

#: Whose time a model's ratio is to: the fastest of these in the same race.
BASELINES = ("timm", "reference")


def show(found: dict[str, list[Record]], against: str | None, out: TextIO) -> None:
    """One race: its records, and what did not take part. Ratios are to BASELINES, or of `against` to the others."""
    records = found["records"]
    if not interactive(out):
        for record in records:
            print(_line(record, ratio(record, records, against)), file=out, flush=True)
    elif records:
        _table(records, against, out)
    for record in found["refused"]:
        kind = "FAILED" if record["failed"] else "not timed"
        print(f"{title(record)} {record['backend']}: {kind}: {record['reason']}", file=out, flush=True)
    _phases(records, out)
    _start_up(found.get("start_up", ()), out)


def ratio(record: Record, group: Sequence[Record], against: str | None) -> float | None:
    """How many times as fast as PyTorch a candidate is; with `against`, how many times as fast that one is as it."""
    if "ratio_to_torch" in record:
        return record["ratio_to_torch"]
    if against:
        ours = [r["ms_median"] for r in group if r["backend"] == against]
        return record["ms_median"] / ours[0] if ours else None
    baselines = [r["ms_median"] for r in group if r["backend"] in BASELINES]
    return min(baselines) / record["ms_median"] if baselines else None


def title(record: Record) -> str:
    """What a race is about."""
    if "id" in record:
        return record["id"]
    return f"{record['model']} {record['mode']} {record['dtype']} batch {record['batch']}"


def _rate(record: Record) -> str:
    return f"{record['rate']:.1f} {record['unit']}" if "id" in record else f"{record['images_per_second']:.1f} images/s"


def _extra(record: Record) -> str:
    """Percent of peak of an op, memory of a model and how far its logits are from the reference."""
    if "id" in record:
        return f"{record['percent_of_peak']:.0f}% of peak" if "percent_of_peak" in record else ""
    text = f"{record['peak_memory_mb']:.0f} MiB"
    return text + (f", cosine {record['logits_cosine']:.5f}" if "logits_cosine" in record else "")


def _line(record: Record, times: float | None) -> str:
    """Aligned with the other lines: they are printed as they come."""
    ratio = "" if times is None else f"{times:.2f}x"
    took = f"{record['ms_median']:9.3f} ms  (best {record['ms_min']:9.3f})"
    line = f"{title(record):<58} {record['backend']:<13} {took}  {_rate(record):>16} {ratio:>7}  {_extra(record)}"
    return line.rstrip()


def _table(records: Sequence[Record], against: str | None, out: TextIO) -> None:
    ops = "id" in records[0]
    versus = f"{against} is" if against and not ops else "ratio"
    columns = ["candidate", "median ms", "best ms", "images/s" if not ops else records[0]["unit"], versus, ""]
    rows = []
    for record in records:
        times = ratio(record, records, against)
        figures = (f"{record['ms_median']:.3f}", f"{record['ms_min']:.3f}", _rate(record).split()[0])
        rows.append((record["backend"], *figures, "" if times is None else f"{times:.2f}x", _extra(record)))
    table(columns, rows, out, title=title(records[0]))


def _phases(records: Sequence[Record], out: TextIO) -> None:
    """Where the engine's time goes."""
    for record in records:
        rows = [
            (phase["name"], f"{phase['ms']:.3f}", f"{100 * phase['share']:.1f}",
             f"{phase['percent_of_peak']:.0f}" if "percent_of_peak" in phase else "")
            for phase in record.get("phases", ())
        ]  # fmt: skip
        if rows:
            name = f"{title(record)}: where the time of {record['backend']} goes"
            table(("phase", "ms", "% of time", "% of peak"), rows, out, title=name)


def _start_up(records: Sequence[Record], out: TextIO) -> None:
    """What fresh processes took."""
    columns = ("first batch of a fresh process", "candidate", "import s", "construct s", "first batch s", "memory MiB")
    fields = ("import_seconds", "construct_seconds", "first_batch_seconds")
    rows = [
        (
            f"{r['model']} {r['dtype']} batch {r['batch']}", r["backend"],
            *((f"{r[name]:.2f}" for name in fields) if "reason" not in r else (r["reason"], "", "")),
            f"{r['process_memory_mb']:.0f}" if "reason" not in r else "",
        )
        for r in records
    ]  # fmt: skip
    if rows:
        table(columns, rows, out, left=2)


def plot(report: dict[str, Any], path: str) -> None:
    """A bar per record with its ratio: images per second of models, GFLOP/s or GB/s of ops; a scale for each race.

    MissingExtra without matplotlib.
    """
    require("matplotlib", "bench").use("Agg")
    pyplot = require("matplotlib.pyplot", "bench")
    against, records = report.get("against"), report["records"]
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(title(record), []).append(record)
    names = list(dict.fromkeys(r["backend"] for r in records))
    heights = [len(group) + 1 for group in groups.values()] or [1]
    figure, grid = pyplot.subplots(
        len(heights), figsize=(9, 1 + 0.3 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axes, (name, group) in zip(grid[:, 0], groups.items(), strict=False):
        values = [r["rate"] if "id" in r else r["images_per_second"] for r in group]
        bars = axes.barh(range(len(group)), values, color=[f"C{names.index(r['backend']) % 10}" for r in group])
        ratios = [ratio(r, group, against) for r in group]
        labels = [_rate(r) + ("" if x is None else f"   {x:.2f}x") for r, x in zip(group, ratios, strict=True)]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.set_yticks(range(len(group)), [r["backend"] for r in group], fontsize=8)
        axes.set_xlim(0, 1.3 * max(values))  # room for the labels
        axes.set_xticks([])
        axes.invert_yaxis()
        axes.set_title(name, fontsize=9, loc="left")
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    found = report["environment"]
    machine = f"{found.get('gpu', found['cpu'])}, {found['threads']} threads, torch {found['torch']}"
    figure.suptitle(f"{machine}\n{_meaning(records, against)}", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _meaning(records: Sequence[Record], against: str | None) -> str:
    if records and "id" in records[0]:
        return "x: times as fast as PyTorch"
    if against:
        return f"x: how many times as fast {against} is"
    return "x: times as fast as the faster of timm and the reference"
