"""Figures on real data that comes in packages: python benchmarks/real_data.py [NAME ...] --data FOLDER --json FILE

The data are those of scripts/real_data.py in FOLDER, the commands those that anyone would type, one thread each. Every
training is done as often as it has seeds, into FOLDER/runs/NAME-SEED, and its test images are looked at once, at the
end. FILE keeps the records of other names.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit.bench.machine import machine, versions

ROOT = Path(__file__).resolve().parent.parent

DINOV2 = ["--model", "vit_small_patch14_dinov2", "--arch", "img_size=56"]


@dataclass(frozen=True)
class Figure:
    """What is measured. data: a name of scripts/real_data.py, if it needs one; words: of `vit`; least: what the
    figure has to reach, if anything; seconds: of the processor, that it may take."""

    about: str
    words: list[str]
    data: str | None = None
    seeds: int = 1
    metric: str = "test_accuracy"
    least: float | None = None
    seconds: float | None = None


FIGURES = {
    "digits": Figure("scikit-learn's digits", ["train"], seeds=5, least=0.98, seconds=120),
    "kaggle_digits": Figure(
        "4,000 digits of MNIST", ["train", "--recipe", "kaggle_digits"], "mnist5k", least=0.975, seconds=1200
    ),
    "fashion_mnist": Figure(
        "Fashion-MNIST", ["train", "--recipe", "fashion_mnist"], "fashion_mnist", least=0.91, seconds=3600
    ),
    "faces": Figure(
        "126 crops of faces and others, DINOv2-S fine-tuned",
        [
            *("train", "--recipe", "finetune", *DINOV2, "--weights", "dinov2/dinov2_small.safetensors"),
            *("--val-fraction", "0", "--epochs", "12", "--batch-size", "16", "--crop-area", "0.6"),
            *("--lr", "3e-4", "--layer-decay", "0.65", "--drop-path", "0.2"),
        ],
        "faces",
        least=0.97,
        seconds=240,
    ),
    "faces-knn": Figure(
        "the same, 5 nearest neighbours by DINOv2-S",
        ["eval", "dinov2/dinov2_small.safetensors", *DINOV2, "--knn", "5"],
        "faces",
        metric="knn_accuracy",
    ),
    "faces-probe": Figure(
        "the same, logistic regression on DINOv2-S",
        ["eval", "dinov2/dinov2_small.safetensors", *DINOV2, "--probe"],
        "faces",
        metric="probe_accuracy",
    ),
}


def command(figure: Figure) -> list[str]:
    """The words after `vit`, to be run in the folder of the data."""
    return [*figure.words, *(["--data", figure.data] if figure.data else [])]


def measure(name: str, folder: Path) -> dict[str, Any]:
    """The record of one figure."""
    figure, found = FIGURES[name], []
    for seed in range(figure.seeds):
        words = command(figure)
        if figure.words[0] == "train":
            words += ["--threads", "1", "--seed", str(seed), "--out", f"runs/{name}-{seed}"]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        process = subprocess.run(
            [sys.executable, "-m", "vit", *words, "--json"], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = json.loads(process.stdout.splitlines()[-1])
        processor = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        found.append((result[figure.metric], processor, time.monotonic() - began))
        print(f"{name}, seed {seed}: {100 * found[-1][0]:.2f} %, {processor:.0f} s of the processor", flush=True)
    return record(name, found)


def record(name: str, found: list[tuple[float, float, float]]) -> dict[str, Any]:
    """What is kept of (figure, seconds of the processor, seconds) of each seed."""
    figure = FIGURES[name]
    values, processor, seconds = zip(*found, strict=True)
    return {
        "name": name,
        "about": figure.about,
        "command": " ".join(["vit", *command(figure)]),
        "metric": figure.metric,
        "values": list(values),
        "least": figure.least,
        "processor_seconds": [round(value, 1) for value in processor],
        "seconds": [round(value, 1) for value in seconds],
        "most_processor_seconds": figure.seconds,
        "load": os.getloadavg()[2],
    }


def keep(path: Path, new: dict[str, Any]) -> None:
    """Puts a record into the file, in the order of FIGURES."""
    old = json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []
    records = {entry["name"]: entry for entry in [*old, new]}
    report = {
        "environment": machine() | versions(("torch", "numpy", "pillow", "scikit-learn")),
        "records": [records[name] for name in FIGURES if name in records],
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    names = args.names or list(FIGURES)
    needed = {data for name in names if (data := FIGURES[name].data)}
    needed |= {"dinov2" for name in names if name.startswith("faces")}
    subprocess.run([sys.executable, ROOT / "scripts" / "real_data.py", args.data, *sorted(needed)], check=True)
    for name in names:
        new = measure(name, args.data)
        if args.json:
            keep(args.json, new)


if __name__ == "__main__":
    main()
