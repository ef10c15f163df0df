"""A model on images: the one code that validation, the end of a training and `vit eval` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data import Samples
from ..data.loader import Images, InOrder, loader
from ..model import VisionTransformer
from ..tasks import Evaluation, Task, get
from .views import Views, averaged


@contextmanager
def cpu_threads(count: int | str | None) -> Iterator[None]:
    """PyTorch's number of threads, which vit's CPU kernels follow, set for a while; 0, "auto" and None leave it."""
    before = torch.get_num_threads()
    try:
        if isinstance(count, int) and count:
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
    task: Task | None = None,
    views: Views | None = None,
    average: str = "logits",
    show: Callable[[Image.Image], Tensor] | None = None,
) -> Evaluation:
    """The figures of `task` (default: classification: mean cross entropy and share of right answers) of `model` on
    `samples`, through model.preprocess, in float32.

    Each image is measured in float64 and the sum is exact (math.fsum), so the result depends neither on the order nor
    on how the images are spread over batches and processes. With several processes, `gather` joins a list over all.
    `advance` is called after every batch. `views` shows each image several times in the place of model.preprocess; the
    logits or, as `average` says, the probabilities are averaged. `show` is asked in the place of model.preprocess, too,
    and gives one view. Raises ReaderError when one of the `workers` dies.
    """
    task = task or get("classification")
    found = "labels" if samples.targets is None else samples.targets.kind
    if task.targets != found:
        raise ValueError(f"vit: the task needs {task.needs}, and the data have {found.replace('_', ' ')}")
    was_training = model.training
    model.eval()
    measured: list[tuple[Tensor, ...]] = []
    order = InOrder(len(samples), batch_size, rank, world)
    with closing(loader(Images(samples, views or show or model.preprocess), order, workers)) as batches:
        for images, labels in batches:
            outputs = model(images.to(model.device).flatten(0, 1) if views else images.to(model.device))
            if views:
                outputs = averaged(outputs.unflatten(0, images.shape[:2]), average)
            outputs = task.arrange(outputs, model)
            measured.append(task.measure(outputs, labels))
            if advance:
                advance()
    model.train(was_training)
    parts = gather([tuple(torch.cat(column) for column in zip(*measured, strict=True))] if measured else [])
    return task.summarize([torch.cat(column) for column in zip(*parts, strict=True)])
