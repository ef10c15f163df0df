"""Draws the photographs' pictures of the documentation: `python docs/assets/pictures.py WEIGHTS` (DINOv2 ViT-S/14)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import vit
from PIL import Image
from sklearn.datasets import load_sample_image
from vit import viz

ASSETS = Path(__file__).resolve().parent
SIZE = (392, 588)  # 28 x 42 patches, of the photographs' shape
COLOURS = 128  # half of a palette, which keeps a photograph below 150 kB


def main(weights: str) -> None:
    china, flower = (Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower"))
    model = vit.create(weights=weights, img_size=SIZE, training=False)
    square = vit.create(weights=weights, img_size=224, training=False)
    with torch.inference_mode():
        write(viz.draw_features(model, [china, flower]), "features.png")
        write(viz.draw_attention(model, [flower]), "attention.png")
        write(viz.draw_posemb(square), "posemb.png")


def write(figure: Any, name: str) -> None:
    """Saves a figure, then keeps the colours of a palette."""
    viz.save(figure, ASSETS / name)
    with Image.open(ASSETS / name) as image:
        image = image.convert("RGB")
        # The common colours of the photographs, and the rare ones at the upper end of a map.
        parts = [image.quantize(COLOURS, method) for method in (Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE)]
        palette = Image.new("P", (1, 1))
        palette.putpalette([value for part in parts for value in (part.getpalette() or [])[: 3 * COLOURS]])
        small = image.quantize(palette=palette, dither=Image.Dither.NONE)
    small.save(ASSETS / name, optimize=True)
    print(name, (ASSETS / name).stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1])
