"""Images of several sizes as one packed forward, and padded: python benchmarks/mixed_sizes.py [--json FILE]

ViT-B/16 in float32 on the cpu backend, 16 images of 64 to 1,024 patches, inference and a training step. "padded" is the
time of 16 images of the largest size: what a batch costs that is filled up to it.
"""

from __future__ import annotations

from typing import Any

import torch
import vit
from script import Records, raced, run
from torch import Tensor
from vit.bench.workers import Candidate
from vit.support.random import normal

MODEL = "vit_base_patch16_224"
SIDES = [8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 26, 29, 32]  # in patches


def images_of(kind: str) -> Any:
    if kind == "padded":
        return normal((len(SIDES), 3, 16 * SIDES[-1], 16 * SIDES[-1]), "images")
    return [normal((3, 16 * side, 16 * side), "image", side) for side in SIDES]


def candidate(kind: str, mode: str) -> Candidate:
    """A forward, or a step of AdamW."""
    model = vit.create(MODEL, backend="cpu", dynamic_img_size=True, training=mode == "train")
    images, optimizer = images_of(kind), vit.optim.AdamW(model.parameters(), lr=1e-4)

    def forward() -> Tensor:
        with torch.inference_mode():
            return model(images)

    def train() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.arange(len(SIDES))).backward()
        optimizer.step()

    return Candidate(train if mode == "train" else forward)


def measure(rounds: int) -> Records:
    """A record per mode and kind."""
    records = []
    for mode in ("inference", "train"):
        kinds = ("packed", "padded")
        for kind, (times, _) in zip(kinds, raced(candidate, [(kind, mode) for kind in kinds], rounds), strict=True):
            records.append({"model": MODEL, "mode": mode, "kind": kind, "patches": [s * s for s in SIDES], **times})
            print(f"{mode:10s} {kind:7s} {times['ms_median']:9.1f} ms", flush=True)
    return records


if __name__ == "__main__":
    run(__doc__, measure)
