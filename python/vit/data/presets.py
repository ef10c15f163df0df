"""Augmentation of torchvision (extra: aug), after a random crop: 3-Augment, RandAugment, TrivialAugment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from PIL import Image

from ..support import affine
from ..support.extras import require
from ..support.random import Stream
from .augment import CropFlip

PRESETS = ("three", "randaug", "trivial")


@dataclass(frozen=True)
class Torchvision:
    """A crop, and then one of PRESETS. torchvision draws from PyTorch's default generator, which is seeded for each
    image and put back, so the pixels depend neither on the workers nor on what was drawn before."""

    resizes: ClassVar[bool] = True

    name: str
    crop: CropFlip

    def __call__(self, image: Image.Image, rng: Stream) -> Image.Image:
        image = self.crop(image, rng)
        before = torch.get_rng_state()
        try:
            torch.manual_seed(int(rng.integers(0, 1 << 31, 1)[0]))
            found: Image.Image = _transform(self.name)(image)
            return found if found.mode == image.mode else found.convert(image.mode)  # 3-Augment's grey has 3 channels
        finally:
            torch.set_rng_state(before)

    def place(self, size: tuple[int, int], rng: Stream) -> affine.Map:
        """That of the crop: "three" changes colours alone, and the others, which turn images too, are refused where
        there is something to move along."""
        return self.crop.place(size, rng)


@cache
def _transform(name: str) -> Any:
    v2 = require("torchvision.transforms.v2", "aug")
    if name == "randaug":
        return v2.RandAugment(num_ops=2, magnitude=9)
    if name == "trivial":
        return v2.TrivialAugmentWide()
    # DeiT III (arXiv:2204.07118): one of greyscale, solarization and blur, then colour jitter.
    choices = [v2.Grayscale(num_output_channels=3), v2.RandomSolarize(128, p=1.0), v2.GaussianBlur(5, (0.1, 2.0))]
    return v2.Compose([v2.RandomChoice(choices), v2.ColorJitter(0.3, 0.3, 0.3)])
