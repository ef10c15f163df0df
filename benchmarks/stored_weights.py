"""What weights in fewer bits cost and gain, as the table of docs/engine.md: python benchmarks/stored_weights.py [MODEL]

Seeded weights with heavy tails; images per second of engines that take turns, at one and at eight images.
"""

from __future__ import annotations

import argparse

import torch
import vit
from tables import markdown, short
from vit.bench.weights import seeded_state
from vit.engine.quantize import figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=8, help="that logits are compared on (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine (default: %(default)s)")
    given = parser.parse_args()

    model = vit.create(given.model, backend="reference", training=False)
    model.load_state_dict(seeded_state(model.state_dict()))
    images = torch.randn(
        given.images,
        model.patch_embed.in_chans,
        *model.patch_embed.img_size,
        generator=torch.Generator().manual_seed(0),
    )
    engines = {
        "float32": vit.Engine(model),
        "bfloat16": vit.Engine(model, "bfloat16"),
        "bfloat16, int8 weights": vit.Engine(model, "bfloat16", weights="int8"),
        "bfloat16, int4 weights": vit.Engine(model, "bfloat16", weights="int4"),
        "int8": vit.Engine(model, "int8"),
    }
    labels = torch.zeros(given.images, dtype=torch.int64)
    one, eight = (figures(list(engines.values()), images, labels, batch, given.rounds) for batch in (1, 8))
    columns = (short(model.name), "weights", "cosine to float32 logits", "images/s, batch 1", "images/s, batch 8")
    rows = [
        (
            name,
            f"{first.weight_bytes / 2**20:.0f} MiB",
            f"{first.cosine:.5f}",
            f"{first.images_per_second:.1f}",
            f"{second.images_per_second:.1f}",
        )
        for name, first, second in zip(engines, one, eight, strict=True)
    ]
    print("\n".join(markdown(columns, rows)))


if __name__ == "__main__":
    main()
