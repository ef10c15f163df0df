"""mixup and CutMix: two images of a batch become one, and so do their labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..support.random import Stream


def mixed(
    images: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float, rng: Stream
) -> tuple[Tensor, Tensor]:
    """The batch, each image blended with the one at the mirrored place, and soft targets float32 [B, classes].

    mixup (arXiv:1710.09412): lambda x + (1 - lambda) x' with lambda from Beta(mixup, mixup); CutMix (arXiv:1905.04899):
    a rectangle of 1 - lambda of the area is taken from x'. With both one of them, by a coin. images: [B, C, H, W],
    labels: int64 [B], or shares of the classes float32 [B, classes]
    """
    coin, top, left = rng.uniform(0.0, 1.0, 3).tolist()
    cut = cutmix > 0 and (mixup == 0 or coin < 0.5)
    share = beta(cutmix if cut else mixup, rng)
    if cut:
        images = images.clone()
        height, width = images.shape[2:]
        h, w = round(height * math.sqrt(1 - share)), round(width * math.sqrt(1 - share))
        y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
        images[:, :, y : y + h, x : x + w] = images.flip(0)[:, :, y : y + h, x : x + w]
        share = 1 - h * w / (height * width)
    else:
        images = torch.lerp(images.flip(0), images, share)
    hot = labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels, classes).float()
    return images, torch.lerp(hot.flip(0), hot, share)


def beta(alpha: float, rng: Stream) -> float:
    """A number from Beta(alpha, alpha), to 6 digits: powers differ in their last bits from one C library to another.

    Jöhnk 1964: of uniform u and v, x = u^(1/alpha) and y = v^(1/alpha) with x + y <= 1 give x / (x + y).
    """
    while True:
        x, y = (value ** (1 / alpha) for value in rng.uniform(0.0, 1.0, 2).tolist())
        if 0 < x + y <= 1:
            return round(x / (x + y), 6)
