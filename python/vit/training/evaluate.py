"""Accuracy and loss of a model on images: the one code that validation, the end of a training and `vit eval`
share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Samples
from ..data.loader import Images, InOrder, loader
from ..model import VisionTransformer


@dataclass(frozen=True)
class Evaluation:
    """Figures over `images` images, and label and prediction of each (int64 [images])."""

    accuracy: float
    loss: float
    images: int
    labels: Tensor
    predictions: Tensor


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """PyTorch's number of threads, which vit's CPU kernels follow, set for a while; 0 or None leaves it."""
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def evaluate(
    model: VisionTransformer,
    samples: Samples,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[list[Any]], list[Any]] = list,
    advance: Callable[[], None] | None = None,
) -> Evaluation:
    """Mean cross entropy and share of right answers of `model` on `samples`, through model.preprocess, in
    float32.

    The loss of each image is computed in float64 and the sum is exact (math.fsum), so the result depends
    neither on the order nor on how the images are spread over batches and processes. With several processes,
    `gather` joins a list over all of them. `advance` is called after every batch.
    """
    was_training = model.training
    model.eval()
    losses: list[Tensor] = []
    found: list[Tensor] = []
    truth: list[Tensor] = []
    batches = loader(Images(samples, model.preprocess), InOrder(len(samples), batch_size, rank, world), workers)
    for images, labels in batches:
        logits = model(images.to(model.device)).double().cpu()
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        found.append(logits.argmax(dim=1))
        truth.append(labels)
        if advance:
            advance()
    model.train(was_training)
    parts = gather([(torch.cat(losses), torch.cat(found), torch.cat(truth))] if losses else [])
    loss, predictions, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    right = int((predictions == labels).sum())
    total = math.fsum(loss.tolist())
    return Evaluation(right / len(labels), total / len(labels), len(labels), labels, predictions)
