"""How far int8 turns the logits over weights, images and instruction sets: python benchmarks/int8_spread.py --json FILE

The cosine of int8's logits with float32's, image by image, for every weight seed, batch and instruction-set level, with
and without calibration. Weights are those of vit/bench/weights.py; images have structure at several scales, as noise
alone hardly reaches the class token. Prints the table of docs/engine.md: the smallest mean of a batch, the smallest
cosine of an image and the mean of all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vit
from tables import spread
from torch import Tensor, nn
from vit.bench.machine import machine
from vit.bench.weights import seeded_state

MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")


def structured_images(count: int, size: int, *seed: int) -> Tensor:
    """Sums of noise at four scales, [count, 3, size, size]."""
    random = np.random.default_rng(seed)
    total = torch.zeros(count, 3, size, size)
    for side, strength in ((4, 1.0), (16, 0.7), (64, 0.4), (size, 0.2)):
        noise = torch.from_numpy(random.standard_normal((count, 3, side, side), np.float32))
        total += strength * nn.functional.interpolate(noise, (size, size), mode="bilinear")
    return total


def seeded_model(name: str, seed: int) -> nn.Module:
    model = vit.create(name, backend="reference", training=False)
    model.load_state_dict(seeded_state(model.state_dict(), seed))
    return model


def images_of(given: argparse.Namespace, seed: int) -> Tensor:
    """[batches, images, 3, 224, 224]."""
    return torch.stack([structured_images(given.images, 224, seed, batch) for batch in range(given.batches)])


def logits(engine: vit.Engine, batches: Tensor) -> Tensor:
    return torch.stack([torch.as_tensor(engine(batch)) for batch in batches])


def cosines_here(given: argparse.Namespace, name: str, truths: Path) -> Iterator[dict[str, Any]]:
    """One record for each weight seed with and without calibration, at the level of this process."""
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        model, batches = seeded_model(name, seed), images_of(given, seed)
        truth = torch.from_numpy(np.load(truths / f"{seed}.npy"))
        for images in (None, structured_images(2, 224, seed, given.batches)):
            engine = vit.Engine(model, "int8", calibrate=images)
            found = nn.functional.cosine_similarity(logits(engine, batches).double(), truth.double(), dim=-1)
            yield {
                **{"model": name, "isa": engine.isa, "seed": seed, "calibrated": images is not None},
                "cosines": [[round(value, 7) for value in batch] for batch in found.tolist()],
            }


def cosines(given: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """The records of all levels, each in a process of its own; the float32 logits are this one's."""
    with tempfile.TemporaryDirectory() as truths:
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            truth = logits(vit.Engine(seeded_model(name, seed)), images_of(given, seed))
            np.save(Path(truths) / f"{seed}.npy", truth.numpy())
        for level in given.levels:
            print(f"{name} {level}", file=sys.stderr, flush=True)
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--child", name, truths],
                env=os.environ | {"VIT_CPU_ISA": level}, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            yield from map(json.loads, done.stdout.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    levels = vit.backends()["cpu"]["isa available"].split(", ")
    add("--models", nargs="+", default=MODELS, metavar="MODEL")
    add("--levels", nargs="+", default=levels, choices=levels, help="instruction sets (default: all that run here)")
    add("--seeds", type=int, default=8, help="of weights (default: %(default)s)")
    add("--first-seed", type=int, default=0, help="(default: %(default)s)")
    add("--batches", type=int, default=8, help="for each seed (default: %(default)s)")
    add("--images", type=int, default=2, help="in a batch (default: %(default)s)")
    add("--json", type=Path, help="write all cosines and the machine")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        for record in cosines_here(given, given.child[0], Path(given.child[1])):
            print(json.dumps(record), flush=True)
        return
    records = [record for name in given.models for record in cosines(given, name)]
    report = {"environment": machine(), "records": records}
    if given.json:
        lines = ",\n  ".join(map(json.dumps, records))
        environment = json.dumps(report["environment"], indent=1)
        given.json.write_text(f'{{\n "environment": {environment},\n "records": [\n  {lines}\n ]\n}}\n')
    print("\n".join(spread(report)))


if __name__ == "__main__":
    main()
