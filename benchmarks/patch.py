"""timm's models as they are and with vit.patch, in one race: python benchmarks/patch.py [--json FILE]

Inference in eval mode and one AdamW step, float32, each candidate in a process of its own (vit.bench.workers). The
weights are timm's own initialisation from one seed, and the logits of the two are compared.
"""

from __future__ import annotations

import torch
from script import Records, raced, run
from vit.bench.candidates import training
from vit.bench.race import distance
from vit.bench.workers import Candidate
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
        return Candidate(training(model, images, torch.float32))

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model(images)

    return Candidate(step, result=lambda logits: logits.numpy())


def measure(rounds: int) -> Records:
    """A record per model, mode and candidate."""
    records = []
    for name, image in MODELS.items():
        for mode, batch in BATCHES.items():
            found = raced(candidate, [(name, image, mode, False), (name, image, mode, True)], rounds)
            for backend, (times, result) in zip(("timm", "patched"), found, strict=True):
                about = {"model": name, "backend": backend, "dtype": "float32", "batch": batch, "mode": mode}
                record = about | {"threads": torch.get_num_threads()} | times
                if result is not None:
                    record |= distance(result, found[0][1])
                records.append(record)
                print(f"{name} {mode} batch {batch} {backend:8s} {record['ms_median']:9.1f} ms", flush=True)
    return records


if __name__ == "__main__":
    run(__doc__, measure)
