"""Images as bad cameras, networks and weather make them: ten of the corruptions of ImageNet-C (arXiv:1903.12261).

Each works on the image as the model sees it, in 8 bits, at one of five severities whose numbers are the paper's for
images of 224 x 224. Noise is drawn from a seed and the pixels: an image gets the same whatever its place in the data.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from ..preprocess import Preprocess
from ..support.images import opened
from ..support.random import Stream

SEVERITIES = (1, 2, 3, 4, 5)

Pixels = np.ndarray  # float64 [height, width] or [height, width, 3], 0 to 1


def _gaussian_noise(pixels: Pixels, amount: float, rng: Stream) -> Pixels:
    return pixels + amount * rng.standard_normal(pixels.shape, np.float64)


def _speckle_noise(pixels: Pixels, amount: float, rng: Stream) -> Pixels:
    return pixels + amount * pixels * rng.standard_normal(pixels.shape, np.float64)


def _shot_noise(pixels: Pixels, photons: float, rng: Stream) -> Pixels:
    """Counts of photons by their normal limit: mean and variance are those of Poisson's."""
    return pixels + np.sqrt(pixels / photons) * rng.standard_normal(pixels.shape, np.float64)


def _impulse_noise(pixels: Pixels, share: float, rng: Stream) -> Pixels:
    drawn = rng.uniform(0.0, 1.0, pixels.shape)
    return np.where(drawn < share / 2, 0.0, np.where(drawn < share, 1.0, pixels))


def _brightness(pixels: Pixels, amount: float, rng: Stream) -> Pixels:
    """The largest channel (V of HSV) becomes so much larger, and the others in proportion."""
    value = pixels if pixels.ndim == 2 else pixels.max(axis=2, keepdims=True)
    larger = np.minimum(value + amount, 1.0)
    return np.where(value > 0, pixels * larger / np.maximum(value, 1e-9), larger)


def _contrast(pixels: Pixels, share: float, rng: Stream) -> Pixels:
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return (pixels - mean) * share + mean


def _saturate(pixels: Pixels, factor: float, rng: Stream) -> Pixels:
    """The distance of each channel from the largest is multiplied (S of HSV), at most to where one is 0."""
    if pixels.ndim == 2:
        return pixels
    value = pixels.max(axis=2, keepdims=True)
    away = (value - pixels.min(axis=2, keepdims=True)) / np.maximum(value, 1e-9)  # the saturation
    return value - (value - pixels) * np.minimum(factor, 1 / np.maximum(away, 1e-9))


def _gaussian_blur(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _pixelate(image: Image.Image, share: float) -> Image.Image:
    small = [max(1, int(side * share)) for side in image.size]
    return image.resize((small[0], small[1]), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def _jpeg_compression(image: Image.Image, quality: float) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    with opened(file) as found:
        found.load()
    return found


#: Name -> function and its number at each severity.
_OF_PIXELS: dict[str, tuple[Callable[[Pixels, float, Stream], Pixels], tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturate": (_saturate, (0.3, 0.1, 2, 5, 20)),
}
_OF_IMAGES: dict[str, tuple[Callable[[Image.Image, float], Image.Image], tuple[float, ...]]] = {
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg_compression, (25, 18, 15, 10, 7)),
}

CORRUPTIONS = (*_OF_PIXELS, *_OF_IMAGES)


@dataclass(frozen=True)
class Corrupted:
    """An image -> float32 [C, H, W] as `preprocess` gives it, corrupted before it is normalised.

    Raises ValueError for an unknown kind or severity, and for saturation of grey images, which have none.
    """

    preprocess: Preprocess
    kind: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in CORRUPTIONS:
            raise ValueError(f"vit: no corruption is called {self.kind!r}; known are {', '.join(CORRUPTIONS)}")
        if self.severity not in SEVERITIES:
            raise ValueError(f"vit: the severity of a corruption is {self.severity}; allowed are 1 to 5")
        if self.kind == "saturate" and self.preprocess.in_chans == 1:
            raise ValueError("vit: saturate changes nothing of grey images, which the model takes")

    def __call__(self, image: Image.Image) -> Tensor:
        return self.preprocess.normalize(self.changed(self.preprocess.resize(self.preprocess.convert(image))))

    def changed(self, image: Image.Image) -> Image.Image:
        """The corrupted image, of the same size and mode (L or RGB)."""
        place = self.severity - 1
        if self.kind in _OF_IMAGES:
            on_image, amounts = _OF_IMAGES[self.kind]
            return on_image(image, amounts[place])
        of_pixels, amounts = _OF_PIXELS[self.kind]
        rng = Stream("corrupt", self.kind, self.severity, self.seed, zlib.crc32(image.tobytes()))
        found = of_pixels(np.asarray(image) / 255.0, amounts[place], rng)
        return Image.fromarray(np.rint(255 * np.clip(found, 0, 1)).astype(np.uint8))
