"""Several views of an image for one answer: crops as in "Going deeper with convolutions" (arXiv:1409.4842), mirrors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..preprocess import INTERPOLATIONS, Preprocess

CROPS = (1, 5, 10, 144)
AVERAGES = ("logits", "probabilities")

#: Shorter side of the resized image over that of a crop, where the model's own transform leaves no room for crops.
_ROOM = 256 / 224
_SCALES = (256 / 224, 288 / 224, 320 / 224, 352 / 224)


@dataclass(frozen=True)
class Views:
    """An image -> float32 [views, C, H, W], in the place of a Preprocess.

    crops: 1, the model's own transform; 5, the corners and the centre; 10, also mirrored; 144, of four sizes three
    squares (left, centre, right) each, of a square corners, centre and the whole, all of it mirrored too
    flip: mirrored too, where crops do not say so already
    """

    preprocess: Preprocess
    crops: int = 1
    flip: bool = False

    def __post_init__(self) -> None:
        if self.crops not in CROPS:
            raise ValueError(f"vit: crops are {self.crops}; allowed are {', '.join(map(str, CROPS))}")

    def __call__(self, image: Image.Image) -> Tensor:
        views = list(self._views(self.preprocess.convert(image)))
        if self.flip or self.crops in (10, 144):
            views += [view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for view in views]
        return torch.stack([self.preprocess.normalize(view) for view in views])

    def _views(self, image: Image.Image) -> Iterator[Image.Image]:
        if self.crops == 1:
            yield self.preprocess.resize(image)
        elif self.crops == 144:
            for scale in _SCALES:
                for square in _squares(self._resized(image, scale)):
                    yield from self._corners_and_centre(square)
                    yield square.resize(self.preprocess.img_size[::-1], self._resample)
        else:
            yield from self._corners_and_centre(self._resized(image, max(_ROOM, 1 / self.preprocess.crop_pct)))

    def _resized(self, image: Image.Image, scale: float) -> Image.Image:
        """The image, as large as a crop times `scale`, its shape kept."""
        height, width = self.preprocess.img_size
        factor = scale * max(height / image.height, width / image.width)
        size = max(width, round(image.width * factor)), max(height, round(image.height * factor))
        return image.resize(size, self._resample)

    def _corners_and_centre(self, image: Image.Image) -> Iterator[Image.Image]:
        height, width = self.preprocess.img_size
        right, down = image.width - width, image.height - height
        for left, top in ((0, 0), (right, 0), (0, down), (right, down), (right // 2, down // 2)):
            yield image.crop((left, top, left + width, top + height))

    @property
    def _resample(self) -> Image.Resampling:
        return INTERPOLATIONS[self.preprocess.interpolation]


def _squares(image: Image.Image) -> Iterator[Image.Image]:
    """The first, the middle and the last square of the image."""
    side = min(image.size)
    for share in (0.0, 0.5, 1.0):
        left, top = (int((length - side) * share) for length in image.size)
        yield image.crop((left, top, left + side, top + side))


def averaged(outputs: Tensor, average: str) -> Tensor:
    """Logits [B, views, classes] -> [B, classes]: their mean, or the logarithm of the mean probability. float64."""
    if average == "logits":
        return outputs.double().mean(dim=1)
    return outputs.double().softmax(dim=2).mean(dim=1).log()
