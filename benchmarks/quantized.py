"""A model by vit.quantize beside the model it was made from, in one race: python benchmarks/quantized.py [--json FILE]

ViT-B/16 in bfloat16 on the cpu backend, 8 images, weights of vit/bench/weights.py: the times of a forward, and the
smallest cosine of an image's logits with those in float32.
"""

from __future__ import annotations

import torch
import vit
from script import Records, raced, run
from torch import Tensor, nn
from vit.bench.weights import seeded_state
from vit.bench.workers import Candidate
from vit.support.random import normal

MODEL, BATCH = "vit_base_patch16_224", 8
KINDS = ("bfloat16", "int8", "int8 calibrated")


def made(kind: str) -> nn.Module:
    model = vit.create(MODEL, backend="cpu", training=False)
    model.load_state_dict(seeded_state(model.state_dict(), 0))
    if kind == "float32":
        return model
    model.to(torch.bfloat16)
    images = normal((2, 3, 224, 224), "calibration").to(torch.bfloat16)
    return model if kind == "bfloat16" else vit.quantize(model, calibrate=images if "calibrated" in kind else None)


def logits(kind: str, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return made(kind)(images).double()


def candidate(kind: str) -> Candidate:
    """One forward."""
    model, images = made(kind), normal((BATCH, 3, 224, 224), "images").to(torch.bfloat16)

    def step() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return Candidate(step, result=lambda out: out.float().numpy())


def measure(rounds: int) -> Records:
    """A record per kind of model."""
    truth, records = logits("float32", normal((BATCH, 3, 224, 224), "images")), []
    for kind, (times, found) in zip(KINDS, raced(candidate, [(kind,) for kind in KINDS], rounds), strict=True):
        cosines = nn.functional.cosine_similarity(torch.from_numpy(found).double(), truth, dim=-1)
        records.append({"model": MODEL, "kind": kind, "batch": BATCH, **times, "cosine": cosines.min().item()})
        print(f"{kind:16s} {times['ms_median']:8.1f} ms  cosine {records[-1]['cosine']:.5f}", flush=True)
    return records


if __name__ == "__main__":
    run(__doc__, measure)
