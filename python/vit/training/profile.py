"""What a training's images are like, and how fast they come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ..data import Samples
from ..data.augment import Augment
from ..data.loader import EpochBatches, Images, loader
from ..preprocess import Preprocess


def loader_profile(
    samples: Samples,
    preprocess: Preprocess,
    augment: Augment | None,
    batch_size: int,
    workers: int,
    batches: int,
    step: Callable[[Tensor], object] | None = None,
) -> dict[str, Any]:
    """Statistics of the first `batches` training batches, as shares of full brightness, and the pace of the loader.

    mean, std, min and max are per channel over all pixels, after resizing and augmentation, before normalisation. The
    first batch, which starts the readers, counts for the statistics alone. step: called with each batch, as a training
    step would be; `data_share` is then the share of the time that went by waiting for images.
    """
    size = min(batch_size, len(samples))
    order = EpochBatches(len(samples), size, seed=0)
    (sums, squares), count = torch.zeros(2, preprocess.in_chans, dtype=torch.float64, device="cpu"), 0
    low, high = torch.full_like(sums, math.inf), torch.full_like(sums, -math.inf)
    mean, std = (
        torch.tensor(value, dtype=torch.float32, device="cpu").double().view(1, -1, 1, 1)
        for value in (preprocess.mean, preprocess.std)
    )
    waited = computed = 0.0
    timed = done = 0
    with closing(loader(Images(samples, preprocess, augment), order, workers)) as batch_loader:
        passes = iter(batch_loader)
        while done < batches:
            began = time.perf_counter()
            batch = next(passes, None)
            if batch is None:
                if not len(order):
                    break
                order.epoch += 1
                passes = iter(batch_loader)
                continue
            arrived = time.perf_counter()
            if step:
                step(batch[0])
            if done or batches == 1:
                waited += arrived - began
                computed += time.perf_counter() - arrived
                timed += len(batch[0])
            done += 1
            pixels = batch[0].double() * std + mean
            sums += pixels.sum(dim=(0, 2, 3))
            squares += pixels.square().sum(dim=(0, 2, 3))
            count += pixels[:, 0].numel()
            low, high = torch.minimum(low, pixels.amin(dim=(0, 2, 3))), torch.maximum(high, pixels.amax(dim=(0, 2, 3)))
        passes.close()
    average = sums / count
    figures = {
        "mean": average.tolist(),
        "std": (squares / count - average.square()).clamp(min=0).sqrt().tolist(),
        "min": low.tolist(),
        "max": high.tolist(),
    }
    pace: dict[str, Any] = {"images_per_second": round(timed / max(waited, 1e-9), 1)}
    if step:
        pace |= {"step_ms": 1000 * computed * size / timed, "data_share": waited / max(waited + computed, 1e-9)}
    return {name: [round(value, 6) for value in values] for name, values in figures.items()} | pace
