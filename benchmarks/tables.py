"""The tables of docs/benchmarks.md, docs/engine.md and docs/training.md from the records: python benchmarks/tables.py

Records are those of benchmarks/results. A table stands between `<!-- table NAME FILE -->` and `<!-- end -->`; the text
around it is written by hand. A regular expression after FILE chooses among the ops.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = tuple(ROOT / "docs" / name for name in ("benchmarks.md", "engine.md", "training.md"))
RESULTS = ROOT / "benchmarks" / "results"

BLOCK = re.compile(r"(<!-- table (\w+) (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)

Record = dict[str, Any]
Report = dict[str, Any]


def generate(text: str) -> str:
    """The document with every table made anew."""

    def fill(match: re.Match[str]) -> str:
        report = json.loads((RESULTS / match[3]).read_text(encoding="utf-8"))
        if match[4]:
            report["records"] = [record for record in report["records"] if re.search(match[4], record["id"])]
        return match[1] + "\n".join(TABLES[match[2]](report)) + "\n" + match[5]

    return BLOCK.sub(fill, text)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]


def races(records: Sequence[Record]) -> dict[tuple[Any, ...], dict[str, Record]]:
    """(model, mode, dtype, batch) -> candidate -> its record, in the order of the file."""
    found: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        key = (record["model"], record["mode"], record["dtype"], record["batch"])
        found.setdefault(key, {})[record["backend"]] = record
    return found


def about(key: tuple[Any, ...]) -> str:
    model, mode, dtype, batch = key
    return f"{short(model)}, {dtype}, batch {batch}" + (", training" if mode == "train" else "")


def short(model: str) -> str:
    """ "vit_base_patch16_384" -> "ViT-B/16 at 384"."""
    name, *settings = model.split(":")
    sizes = dict(setting.split("=") for setting in settings)
    match = re.fullmatch(r"(vit|deit)_([a-z]+)_patch(\d+)_(\d+)", name)
    if not match:
        return model
    family = {"vit": "ViT", "deit": "DeiT"}[match[1]]
    size = {"tiny": "Ti", "giant": "g"}.get(match[2], match[2][0].upper())
    image = sizes.get("img_size", match[4])
    return f"{family}-{size}/{sizes.get('patch_size', match[3])}" + (f" at {image}" if image != "224" else "")


PYTORCH = ("reference", "timm", "torch")


def natives(report: Report) -> list[str]:
    """The backends with kernels of our own, in the order of the report."""
    return list(dict.fromkeys(r["backend"] for r in report["records"] if r["backend"] not in PYTORCH))


def models(report: Report) -> list[str]:
    """Backends against the faster of timm and the reference."""
    found, ours = races(report["records"]), natives(report)
    names = [name for name in (*PYTORCH, *ours) if any(name in race for race in found.values())]
    rows = []
    for key, race in found.items():
        baseline = min(race[name]["ms_median"] for name in PYTORCH if name in race)
        times = [f"{race[name]['ms_median']:.0f} ms" if name in race else "" for name in names]
        ratios = [f"{baseline / race[name]['ms_median']:.2f}" if name in race else "" for name in ours]
        sizes = " / ".join(f"{race[name]['peak_memory_mb']:.0f}" if name in race else "-" for name in ("timm", *ours))
        rows.append([about(key), *times, *ratios, f"{sizes} MiB"])
    heads = [f"ratio of {name}" for name in ours]
    return markdown(("model", *names, *heads, "peak memory, " + " / ".join(("timm", *ours))), rows)


def ops(report: Report) -> list[str]:
    """A row per shape and direction: percent of peak or GB/s of each backend, and its ratio to PyTorch."""
    rows: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for record in report["records"]:
        if record["backend"] in PYTORCH:
            continue
        text = f"{record['percent_of_peak']:.0f} %" if "percent_of_peak" in record else f"{record['rate']:.0f} GB/s"
        name, column = record["id"].replace(f"-{record['dtype']}-", "-"), f"{record['backend']}, {record['dtype']}"
        columns[column] = None
        rows.setdefault(name, {})[column] = f"{text}, {record['ratio_to_torch']:.2f}"
    body = [[name, *(cells.get(column, "") for column in columns)] for name, cells in rows.items()]
    return markdown(("op", *(f"{column}: of peak, ratio to PyTorch" for column in columns)), body)


def peers(report: Report) -> list[str]:
    """The engine's images per second, and how many times as fast it is as each peer in the same race."""
    names = list(dict.fromkeys(r["backend"] for r in report["records"] if r["backend"] != "engine"))
    rows = []
    for key, race in races(report["records"]).items():
        if "engine" not in race:
            continue
        ours = race["engine"]
        cells = [
            f"{race[name]['images_per_second']:.1f} ({race[name]['ms_median'] / ours['ms_median']:.2f})"
            if name in race
            else "-"
            for name in names
        ]
        rows.append([about(key), f"{ours['images_per_second']:.1f}", *cells])
    return markdown(("images per second (engine is so many times as fast)", "engine", *names), rows)


def accuracy(report: Report) -> list[str]:
    """Cosine of the logits with the float32 reference, largest difference over the largest logit, and memory."""
    names = list(dict.fromkeys(r["backend"] for r in report["records"]))
    rows = []
    for key, race in races(report["records"]).items():
        cells = [
            f"{race[n]['logits_cosine']:.5f}, {race[n]['logits_max_error']:.0e}, {race[n]['peak_memory_mb']:.0f} MiB"
            if n in race
            else "-"
            for n in names
        ]
        rows.append([about(key), *cells])
    return markdown(("logits: cosine, largest difference; memory", *names), rows)


def phases(report: Report) -> list[str]:
    """Share of the engine's time and percent of the peak of each phase."""
    found = {
        key: {phase["name"]: phase for phase in race["engine"]["phases"]}
        for key, race in races(report["records"]).items()
        if race.get("engine", {}).get("phases")
    }
    names = list(dict.fromkeys(name for entries in found.values() for name in entries))
    rows = []
    for key, entries in found.items():
        cells = []
        for name in names:
            phase = entries[name]
            peak = f" ({phase['percent_of_peak']:.0f})" if "percent_of_peak" in phase else ""
            cells.append(f"{100 * phase['share']:.1f}{peak}")
        rows.append([about(key), *cells])
    return markdown(("% of time (% of peak)", *names), rows)


def start_up(report: Report) -> list[str]:
    rows = [
        [
            f"{short(r['model'])}, {r['dtype']}", r["backend"], f"{r['import_seconds']:.2f} s",
            f"{r['construct_seconds']:.2f} s", f"{r['first_batch_seconds']:.2f} s", f"{r['process_memory_mb']:.0f} MiB",
        ]
        for r in report.get("start_up", ())
        if "reason" not in r
    ]  # fmt: skip
    return markdown(("fresh process", "", "import", "construct", "first batch", "memory of the process"), rows)


def spread(report: Report) -> list[str]:
    """Cosine of int8's logits with float32's over weights and images: the smallest mean of a batch, the smallest of an
    image, the mean of all, without and with calibration."""
    groups: dict[tuple[str, str], dict[bool, list[list[float]]]] = {}
    for record in report["records"]:
        kinds = groups.setdefault((record["model"], record["isa"]), {False: [], True: []})
        kinds[record["calibrated"]] += record["cosines"]
    rows = []
    for (model, isa), kinds in groups.items():
        figures, images = [], 0
        for batches in (kinds[calibrated] for calibrated in (False, True)):
            every = [cosine for batch in batches for cosine in batch]
            images = len(every)
            smallest = min(sum(batch) / len(batch) for batch in batches)
            figures += [f"{value:.5f}" for value in (smallest, min(every), sum(every) / images)]
        rows.append((short(model), isa, str(images), *figures))
    plain = ("smallest batch", "smallest image", "mean")
    return markdown(("", "level", "images", *plain, *(f"calibrated: {name}" for name in plain)), rows)


def real_data(report: Report) -> list[str]:
    """Each figure on real data, the least that it has to be, and what it cost."""
    rows = []
    for record in report["records"]:
        values, least = record["values"], record["least"]
        shown = f"{100 * values[0]:.2f} %"
        if len(values) > 1:
            shown = f"{shown}; {len(values)} seeds: {100 * min(values):.2f} to {100 * max(values):.2f} %"
        needed = f"{100 * least:g} %" if least else ""
        costs = record["processor_seconds"]
        cost = f"{sum(costs) / len(costs):.0f} s" if costs else ""
        rows.append([record["about"], f"`{record['command']}`", shown, needed, cost])
    return markdown(("data", "command", "of the test images", "to reach", "processor time"), rows)


TABLES: dict[str, Callable[[Report], list[str]]] = {
    "models": models, "ops": ops, "peers": peers, "accuracy": accuracy, "phases": phases, "start_up": start_up,
    "spread": spread, "real_data": real_data,
}  # fmt: skip


def main() -> int:
    for document in DOCUMENTS:
        document.write_text(generate(document.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
