"""The names of ImageNet's classes, for weights that come without: from timm or torchvision, where one is installed."""

from __future__ import annotations

from dataclasses import dataclass

#: Numbers of classes of published models -> timm's name of that choice of classes.
SUBSETS = {1000: "imagenet-1k", 11_821: "imagenet-12k", 21_841: "imagenet-22k", 21_843: "imagenet-21k-goog"}


@dataclass(frozen=True)
class ImageNet:
    """Per class index the WordNet number (n01440764), where it is known, and the name in words."""

    synsets: tuple[str, ...]
    names: tuple[str, ...]


def imagenet(num_classes: int) -> ImageNet | None:
    """The classes of an ImageNet model with so many of them; None for other numbers, or where no package has them."""
    if num_classes not in SUBSETS:
        return None
    try:
        from timm.data import ImageNetInfo

        info = ImageNetInfo(SUBSETS[num_classes])
        indices = range(num_classes)
        return ImageNet(tuple(map(info.index_to_label_name, indices)), tuple(map(info.index_to_description, indices)))
    except (ImportError, AssertionError, KeyError, IndexError):  # the last three: timm does not know that choice
        pass
    if num_classes != 1000:
        return None
    try:
        from torchvision.models import ViT_B_16_Weights
    except ImportError:
        return None
    return ImageNet((), tuple(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]))
