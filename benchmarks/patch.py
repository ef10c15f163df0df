"""timm's models as they are and with vit.patch, in one race: python benchmarks/patch.py [--json FILE]

Inference in eval mode and one AdamW step, float32, each candidate in a process of its own (vit.bench.workers). The
weights are timm's own initialisation from one seed, and the logits of the two are compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from vit.bench.candidates import _training
from vit.bench.peak import cpu_peak
from vit.bench.race import Setting, distance, environment
from vit.bench.workers import Candidate, Failure, Worker, race
from vit.support.random import normal

MODELS = {"vit_small_patch16_224": 224, "vit_small_patch14_dinov2": 224}
BATCHES = {"inference": 8, "train": 16}


def candidate(model_name: str, image: int, mode: str, patched: bool) -> Candidate:
    """A step of timm's model, or of the same one after vit.patch."""
    import timm
    import vit

    torch.manual_seed(0)
    model = timm.create_model(model_name, img_size=image, num_classes=1000).train(mode == "train")
    if patched:
        vit.patch(model, backend="cpu")
    images = normal((BATCHES[mode], 3, image, image), "images")
    if mode == "train":
        return Candidate(_training(model, images, torch.float32))

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model(images)

    return Candidate(step, result=lambda logits: logits.numpy())


def time_models(rounds: int, threads: int) -> list[dict[str, Any]]:
    """A record per model, mode and candidate."""
    records = []
    for name, image in MODELS.items():
        for mode, batch in BATCHES.items():
            workers = [Worker(threads), Worker(threads)]
            try:
                outcomes = race(workers, candidate, [(name, image, mode, False), (name, image, mode, True)], rounds)
                results = [worker.ask("result") for worker in workers]
            finally:
                for worker in workers:
                    worker.stop()
            for backend, outcome, result in zip(("timm", "patched"), outcomes, results, strict=True):
                if isinstance(outcome, Failure):
                    raise RuntimeError(outcome.reason)
                about = {"model": name, "backend": backend, "dtype": "float32", "batch": batch, "mode": mode}
                record = about | {"threads": threads, "ms_median": 1e3 * outcome.median, "ms_min": 1e3 * outcome.best}
                if result is not None:
                    record |= distance(result, results[0])
                records.append(record)
                print(f"{name} {mode} batch {batch} {backend:8s} {record['ms_median']:9.1f} ms", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    records = time_models(args.rounds, threads)
    if args.json:
        setting = Setting(("cpu",), "cpu", threads, args.rounds, cpu_peak(threads))
        report = {"environment": environment(setting), "records": records}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
