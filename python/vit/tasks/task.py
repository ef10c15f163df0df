"""The interface between a training and what it is for: loss, figures, what "better" means, and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Figures over `images` images, and label and prediction of each (int64 [images]).

    top5: share of images whose class is among the five likeliest
    ece: expected calibration error: how far confidence and accuracy are apart (arXiv:1706.04599, 15 bins)
    """

    accuracy: float
    loss: float
    images: int
    labels: Tensor
    predictions: Tensor
    top5: float = 0.0
    ece: float = 0.0


class Task(Protocol):
    """One kind of problem. All of it is arithmetic without state, so that a training can stop and go on anywhere."""

    #: The name of the figure by which trainings are compared, a share of which more is better.
    metric: str

    #: The figures of a training step besides its loss, in the order of `monitor`.
    monitored: tuple[str, ...]

    #: Arguments of vit.create that a model for the task needs.
    arch: dict[str, Any]

    #: Whether the data must have a class for each pixel, instead of one for each image.
    needs_masks: bool

    def arrange(self, outputs: Tensor, model: Any) -> Tensor:
        """What the model gives -> the outputs that everything below takes."""

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

    def better(self, new: Figures, old: Figures) -> bool:
        """Whether weights with the validation figures `new` are kept in place of those with `old`."""

    def describe(self, figures: Figures, images: int) -> str:
        """The figures in words, with the interval that the number of images leaves."""

    def picture(
        self, evaluation: Evaluation, class_names: Sequence[str], paths: Sequence[Path], model: Any, samples: Any
    ) -> None:
        """Draws the evaluation of `model` on `samples` into each of the files."""

    #: File name (without suffix) of the picture.
    picture_name: str
