"""The interface between a training and what it is for: loss, figures, what "better" means, and its picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..preprocess import Preprocess

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Figures over `images` images, and label and prediction of each (int64 [images]).

    top5: share of images whose class is among the five likeliest
    ece: expected calibration error: how far confidence and accuracy are apart (arXiv:1706.04599, 15 bins)
    bins: of each bin of the confidence that is not empty (images, mean confidence, accuracy)
    """

    accuracy: float
    loss: float
    images: int
    labels: Tensor
    predictions: Tensor
    top5: float = 0.0
    ece: float = 0.0
    bins: tuple[tuple[int, float, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """What `vit predict` says of one picture.

    record: names and values, for JSON
    lines: the same in words
    pictures: ending of a file name (".png", "-painted.png") -> what is drawn
    """

    record: dict[str, Any]
    lines: list[str]
    pictures: dict[str, Image.Image]


class Task(Protocol):
    """One kind of problem. All of it is arithmetic without state, so that a training can stop and go on anywhere."""

    #: The name of the figure by which trainings are compared, a share of which more is better, and in words.
    metric: str
    metric_name: str

    #: The figures of a training step besides its loss, in the order of `monitor`; the first has the criterion of the
    #: validation loss.
    monitored: tuple[str, ...]

    #: Arguments of vit.create that a model for the task needs.
    arch: dict[str, Any] = {}  # noqa: RUF012 (read only)

    #: And those that a new one has unless others are given.
    head: dict[str, Any] = {}  # noqa: RUF012 (read only)

    #: What the data must have: "labels" of whole images, or a kind of targets (vit.data.targets); that, and data that
    #: has it, in words.
    targets: str
    needs: str
    data: str

    #: Whether the answers are places in the image, which move with it and are of one image each.
    places: bool = True

    #: File name (without suffix) of the picture.
    picture_name: str

    def prepare(self, preprocess: Preprocess) -> Preprocess:
        """How a model for the task is shown its images."""
        return preprocess

    def arrange(self, outputs: Tensor, model: Any) -> Tensor:
        """What the model gives -> the outputs that everything below takes."""
        return outputs

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float, kind: str = "ce") -> Tensor:
        """The mean loss of a batch, which the training makes small: a scalar with a gradient."""

    def monitor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The means of `monitored` over a batch, by the criterion of validation: [len(monitored)], no gradient."""

    def measure(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """What `summarize` needs of a batch: tensors whose first dimension counts the images."""

    def summarize(self, columns: Sequence[Tensor]) -> Evaluation:
        """The evaluation of all images, whose measures are joined in `columns`; exact, whatever their order."""

    def figures(self, evaluation: Evaluation) -> dict[str, float]:
        """The evaluation's figures by name; metrics.jsonl has them with val_ or test_ before the name."""

    def details(self, evaluation: Evaluation, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Of each class its name, under "class", and its share of the figures, None where there is nothing to count."""
        return []

    def better(self, new: Figures, old: Figures) -> bool:
        """Whether weights with the validation figures `new` are kept in place of those with `old`: a higher metric, or
        the same with a smaller loss; a figure that is not finite loses."""
        scores = [(_finite(one[self.metric]), _finite(-one["loss"])) for one in (new, old)]
        return scores[0] > scores[1]

    def describe(self, figures: Figures, images: int) -> str:
        """The figures in words, with the interval that the number of images leaves."""

    def picture(
        self, evaluation: Evaluation, class_names: Sequence[str], paths: Sequence[Path], model: Any, samples: Any
    ) -> None:
        """Draws the evaluation of `model` on `samples` into each of the files."""

    #: What `vit predict` says of a picture, (model, image) -> Answer; None: of a task whose answers are classes.
    answer: Callable[[Any, Image.Image], Answer] | None = None


def first_images(model: Any, samples: Any) -> Iterator[tuple[int, Any]]:
    """Number and picture of the first images, at most 6, which `picture` draws; in the mode that the model takes."""
    for index in range(min(6, len(samples))):
        yield index, model.preprocess.convert(samples.image(index))


def as_map(outputs: Tensor, model: Any) -> Tensor:
    """Tokens [B, N, classes], or a decoder's map as it is, -> a map [B, classes, rows, columns]."""
    if outputs.ndim == 4:
        return outputs
    return outputs[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, model.patch_embed.grid_size)


def whole(model: Any, image: Any) -> Tensor:
    """A picture squeezed to the size of the model, so that nothing is cut off: [1, in_chans, height, width]."""
    pixels: Tensor = replace(model.preprocess, crop_pct=1.0, crop_mode="squash")(image)[None]
    return pixels.to(model.device, model.dtype)


def stretched(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps [B, classes, h, w] at another size (height, width)."""
    return F.interpolate(maps, (int(size[0]), int(size[1])), mode="bilinear", align_corners=False)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def check_loss(task: str, kind: str, *allowed: str) -> None:
    """ValueError where --loss is none of the task's."""
    if kind not in allowed:
        raise ValueError(f"vit: --task {task} has the loss {' or '.join(allowed)}, not {kind}")
