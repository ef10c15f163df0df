"""Images of several sizes as one packed forward, and padded: python benchmarks/mixed_sizes.py [--json FILE]

ViT-B/16 in float32 on the cpu backend, 16 images of 64 to 1,024 patches, inference and a training step. "padded" is the
time of 16 images of the largest size: what a batch costs that is filled up to it. "timm" is timm's own way: its
NaFlexVit of the same sizes, on PyTorch, given patches, coordinates and a mask. "engine" is vit.Engine on the
same images. --model, --images: a smaller one.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
import vit
from script import Records, raced, run
from torch import Tensor
from vit.bench.workers import Candidate
from vit.support.random import normal

SIDES = [8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 26, 29, 32]  # in patches


def images_of(kind: str, sides: list[int]) -> Any:
    if kind == "padded":
        return normal((len(sides), 3, 16 * sides[-1], 16 * sides[-1]), "images")
    images = [normal((3, 16 * side, 16 * side), "image", side) for side in sides]
    if kind in ("packed", "engine"):
        return images
    from timm.data.naflex_dataset import NaFlexCollator
    from timm.data.naflex_transforms import Patchify

    return NaFlexCollator(sides[-1] ** 2)([(Patchify(16)(image), 0) for image in images])[0]


def model_of(kind: str, name: str, mode: str) -> Any:
    if kind != "timm":
        return vit.create(name, backend="cpu", dynamic_img_size=True, training=mode == "train")
    import timm

    return timm.create_model(name, use_naflex=True).train(mode == "train")


def candidate(kind: str, mode: str, name: str, sides: list[int]) -> Candidate:
    """A forward, or a step of AdamW."""
    model, images = model_of(kind, name, mode), images_of(kind, sides)
    if kind == "engine":
        return Candidate(partial(vit.Engine(model, num_threads=torch.get_num_threads()), images))
    optimizer = (torch.optim if kind == "timm" else vit.optim).AdamW(model.parameters(), lr=1e-4)

    def forward() -> Tensor:
        with torch.inference_mode():
            return model(images)

    def train() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.arange(len(sides))).backward()
        optimizer.step()

    return Candidate(train if mode == "train" else forward)


def measure(rounds: int, name: str, count: int) -> Records:
    """A record per mode and kind."""
    records = []
    sides = SIDES[:count]
    for mode, kinds in (
        ("inference", ("packed", "padded", "timm", "engine")),
        ("train", ("packed", "padded", "timm")),
    ):
        jobs = [(kind, mode, name, sides) for kind in kinds]
        for kind, (times, _) in zip(kinds, raced(candidate, jobs, rounds), strict=True):
            records.append({"model": name, "mode": mode, "kind": kind, "patches": [s * s for s in sides], **times})
            print(f"{mode:10s} {kind:7s} {times['ms_median']:9.1f} ms", flush=True)
    return records


if __name__ == "__main__":
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--model", default="vit_base_patch16_224")
    more.add_argument("--images", type=int, default=len(SIDES), help="only so many of the smallest")
    given, rest = more.parse_known_args()
    run(__doc__, partial(measure, name=given.model, count=given.images), rest)
