"""What it takes to make a model of a file of weights: python benchmarks/loading.py [--json FILE]

ViT-L/14 of DINOv2 (1.2 GB in float32) as safetensors, by vit.create and by timm.create_model, each in a process of its
own, in turns; the time of that call after all imports, the processor's share of it, and by how much the memory of the
process that is no page of a file grows at most. The file is in the cache of the system. --model: a smaller one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import vit
from script import Records, run

KINDS = ("vit", "vit-pt", "timm", "timm-pt")


def load(kind: str, name: str, folder: Path) -> Any:
    """The model with the weights of the file; of a kind with -pt a pickle of PyTorch's."""
    file = str(folder / ("model.pt" if kind.endswith("-pt") else "model.safetensors"))
    if kind.startswith("vit"):
        return vit.create(name, backend="cpu", weights=file)
    import timm

    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": file, "num_classes": 0})


def child(kind: str, name: str, folder: Path, parent: Connection) -> None:
    """Imports, waits for the parent to look at the memory, loads, says how long it took."""
    if kind.startswith("timm"):
        import timm  # noqa: F401
    vit.create("test_vit", backend="cpu")  # what is imported at the first call
    parent.send("ready")
    parent.recv()
    start, busy = time.perf_counter(), time.process_time()
    model = load(kind, name, folder)
    parent.send((time.perf_counter() - start, time.process_time() - busy))
    parent.recv()
    del model


def anonymous(pid: int) -> int:
    """Bytes of a process that are no pages of a file."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def measured(kind: str, name: str, folder: Path) -> dict[str, float]:
    """Seconds, seconds of the processor, and bytes at the highest, of one load."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(kind, name, folder, theirs))
    process.start()
    theirs.close()
    ours.recv()
    before = most = anonymous(process.pid or 0)
    ours.send("go")
    while not ours.poll(0.002):
        most = max(most, anonymous(process.pid or 0))
    seconds, busy = ours.recv()
    most = max(most, anonymous(process.pid or 0))
    ours.send("done")
    process.join()
    return {"seconds": seconds, "cpu_seconds": busy, "bytes": most - before}


def write(name: str, folder: Path) -> int:
    """Weights of the model in both forms; how many bytes."""
    model = vit.create(name, backend="cpu", weights=None)
    vit.weights.save(model, folder)
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "config.json").unlink()
    return (folder / "model.safetensors").stat().st_size


def measure(rounds: int, name: str) -> Records:
    """A record for each way to load."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        size = write(name, folder)
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind in KINDS:
                found[kind].append(measured(kind, name, folder))
    records = []
    for kind, runs in found.items():
        middle = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        most = max(one["bytes"] for one in runs) / size
        records.append({"model": name, "kind": kind, "file_bytes": size, **middle, "times_the_file": most})
        print(
            f"{kind:8s} {middle['seconds']:7.2f} s, {middle['cpu_seconds']:6.2f} s of the processor, "
            f"{most:.2f} times the file in memory",
            flush=True,
        )
    return records


if __name__ == "__main__":
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--model", default="vit_large_patch14_dinov2")
    given, rest = more.parse_known_args()
    run(__doc__, partial(measure, name=given.model), rest)
