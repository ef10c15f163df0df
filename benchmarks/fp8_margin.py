"""How far vit.quantize turns the logits, by the layers it takes: python benchmarks/fp8_margin.py [MODEL ...]

The cosine of an image's logits with float32's, over weights of vit/bench/weights.py and images drawn from seeds, two
other images to calibrate with; on the reference, whose sums are exact. Prints the table of docs/quantization.md: of
each choice of layers the smallest cosine and the mean.
"""

from __future__ import annotations

import sys

import torch
import vit
from torch import Tensor, nn
from vit.bench.weights import seeded_state
from vit.engine.smooth import LAYERS
from vit.support.random import normal

#: Models and how many seeds of each.
MODELS = {"vit_tiny_patch16_224": 4, "vit_small_patch16_224": 2, "vit_base_patch16_224": 1, "eva02_tiny_patch14_224": 2}
IMAGES = 4

#: What is quantized: dtype, whether images calibrate it, the layers, the first block.
CHOICES = {
    "int8, calibrated": ("int8", True, LAYERS, 0),
    "fp8": ("fp8", False, LAYERS, 0),
    "fp8, calibrated": ("fp8", True, LAYERS, 0),
    "fp8, calibrated, MLPs": ("fp8", True, LAYERS[2:], 0),
    "fp8, calibrated, MLPs but the first": ("fp8", True, LAYERS[2:], 1),
    "fp8, calibrated, the second half of the blocks": ("fp8", True, LAYERS, 6),
    "fp8, calibrated, MLPs of the second half": ("fp8", True, LAYERS[2:], 6),
}


def images(count: int, *key: int | str) -> Tensor:
    """Smooth noise, [count, 3, 224, 224]."""
    return nn.functional.interpolate(normal((count, 3, 8, 8), *key), (224, 224), mode="bicubic")


@torch.no_grad()
def cosines(name: str, seed: int) -> dict[str, Tensor]:
    """Of every choice, image by image."""
    model = vit.create(name, backend="reference", training=False)
    model.load_state_dict(seeded_state(model.state_dict(), seed))
    given, seen, found = images(IMAGES, "images", seed), images(2, "calibration", seed), {}
    truth = model(given).double()
    for what, (dtype, calibrated, layers, first) in CHOICES.items():
        names = [f"blocks.{i}.{layer}" for i in range(len(model.blocks)) for layer in LAYERS]
        kept = [n for n in names if int(n.split(".")[1]) < first or not n.endswith(tuple(layers))]
        quantized = vit.quantize(model, dtype, kept, seen if calibrated else None)
        found[what] = nn.functional.cosine_similarity(quantized(given).double(), truth, dim=-1)
    return found


def main(names: list[str]) -> None:
    for name in names or MODELS:
        results = [cosines(name, seed) for seed in range(MODELS[name])]
        for what in CHOICES:
            all_of_them = torch.cat([found[what] for found in results])
            print(f"{name:24s} {what:48s} {all_of_them.min():.5f} {all_of_them.mean():.5f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
