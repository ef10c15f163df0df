"""From samples to batches. Every random choice is a function of (seed, epoch, image), never of a generator's
history.

So an epoch can be entered at any batch, by any number of workers, and gives the same numbers: nothing to
save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..preprocess import Preprocess
from ..support import affine
from ..support.random import Stream
from .augment import Augment, Erase, generator
from .readers import PATIENCE, WatchedLoader, leave_signals
from .samples import Samples
from .targets import View

Key = tuple[int, ...]  # epoch, index of the image, and which time in that epoch, where it is seen several times


class Images(Dataset[tuple[Tensor, Any]]):
    """(epoch, index) -> (image [C, H, W] float32, class index, or what the data's targets give).

    Without `augment` the image is `preprocess(image)`, whatever the epoch: exactly what evaluation and
    prediction use. With it, the augmentation stands between the colour mode and size on one side and the
    normalisation on the other.
    """

    def __init__(
        self,
        samples: Samples,
        preprocess: Preprocess | Callable[[Image.Image], Tensor],
        augment: Augment | None = None,
        seed: int = 0,
        erase: Erase | None = None,
    ) -> None:
        self.samples = samples
        self.preprocess = preprocess
        self.augment = augment
        self.seed = seed
        self.erase = erase

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> tuple[Tensor, Any]:
        _, index, *_ = key
        image, targets = self.samples.image(index), self.samples.targets
        label: Any = int(self.samples.labels[index])
        if targets is not None:
            label = targets.tensor(index, self._view(image.size, key))
        pixels = self._pixels(image, key)
        if self.erase:
            self.erase(pixels, Stream("erase", self.seed, *key))
        return pixels, label

    def _view(self, size: tuple[int, int], key: Key) -> View:
        """What the model sees of an image of that size: the evaluation transform and the augmentation, as one map."""
        preprocess, augment = self.preprocess, self.augment
        assert isinstance(preprocess, Preprocess)
        place, shown = preprocess.place(size)
        if augment is None:
            return View(place, shown)
        rng = generator(self.seed, *key)
        if augment.resizes:
            return View(augment.place(size, rng), preprocess.img_size[::-1])
        return View(affine.after(place, augment.place(shown, rng)), shown)

    def _pixels(self, image: Image.Image, key: Key) -> Tensor:
        if self.augment is None:
            return self.preprocess(image)
        assert isinstance(self.preprocess, Preprocess)  # augmentation stands between its parts
        image = self.preprocess.convert(image)
        if not self.augment.resizes:
            image = self.preprocess.resize(image)
        image = self.augment(image, generator(self.seed, *key))
        return self.preprocess.normalize(image)


class EpochBatches:
    """The training batches of one process: lists of (epoch, index), each epoch in its own order, remainders
    dropped.

    Set `epoch` and `start` (batches to leave out) before iterating. Ranks take turns at the images, so that
    together they see what one process with `world` times the batch size would.

    repeats: an image comes so often, one time after the other, each with an augmentation of its own (arXiv:1901.09335);
        an epoch has as many batches as without, and so sees that share of the images
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, repeats: int = 1) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world, self.repeats = rank, world, repeats
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[Key]]:
        order = Stream("order", self.seed, self.epoch).permutation(self.count)
        stride = self.batch_size * self.world
        for batch in range(self.start, len(self)):
            places = range(batch * stride + self.rank, (batch + 1) * stride, self.world)
            if self.repeats == 1:
                yield [(self.epoch, int(order[place])) for place in places]
            else:
                yield [(self.epoch, int(order[place // self.repeats]), place % self.repeats) for place in places]


class InOrder:
    """The evaluation batches of one process: every image once, in order; rank r of w takes images r, r + w,
    ..."""

    def __init__(self, count: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.indices = range(rank, count, world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, i) for i in self.indices[start : start + self.batch_size]]


def loader(
    images: Images,
    batches: EpochBatches | InOrder,
    workers: int,
    pin_memory: bool = False,
    timeout: float = PATIENCE,
) -> WatchedLoader:
    """Those batches, once per iteration: (images [B, C, H, W] float32, labels [B] int64).

    Iterating raises ReaderError when one of the `workers` processes dies or is stopped, or none gives a batch for
    `timeout` seconds.
    """
    found: DataLoader[Any] = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory and torch.cuda.is_available(),
        worker_init_fn=leave_signals,
    )
    return WatchedLoader(found, timeout)
