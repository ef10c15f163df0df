"""Several classes per image, or none: binary cross entropy of each, mean average precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .task import Answer, Evaluation, Figures, Task, check_loss, first_images


@dataclass(frozen=True)
class Labelled(Evaluation):
    """`accuracy` is the share of right yes or no answers, `loss` the mean over them.

    ap: average precision of each class, NaN where no image has it; map: the mean of the others; f1: 2 hits / (answers +
    labels) over all classes together, an answer being a probability of a half and more
    """

    map: float = 0.0
    f1: float = 0.0
    ap: list[float] = field(default_factory=list)


class MultiLabel(Task):
    """Images [B, C, H, W] -> logits [B, classes], against which classes are there, float32 [B, classes] of 0 and 1."""

    metric, metric_name = "map", "mAP"
    monitored = ("train_cross_entropy", "train_accuracy")
    picture_name = "labels"
    places = False
    targets, needs = "label_sets", "a set of classes for each image"
    data = "a .csv with image,labels (cat|dog), or image and a column of 0 and 1 for each class"

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float, kind: str = "bce") -> Tensor:
        """Binary cross entropy in float32, the mean over images and classes; `smoothing` moves 0 and 1 to each other by
        half of it. kind: "bce"; "ce" is the same here."""
        check_loss("multi_label", kind, "bce", "ce")
        wanted = targets * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(outputs.float(), wanted)

    @torch.no_grad()
    def monitor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Plain binary cross entropy, and share of right answers: float32 [2]."""
        logits = outputs.detach().float()
        right = ((logits >= 0) == (targets >= 0.5)).float().mean()
        return torch.stack([F.binary_cross_entropy_with_logits(logits, targets), right])

    def measure(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Per image its loss (float64), its logits (float64) and labels (bool) [B, classes]."""
        logits = outputs.double().cpu()
        loss = F.binary_cross_entropy_with_logits(logits, targets.double(), reduction="none").mean(dim=1)
        return loss, logits, targets > 0.5

    def summarize(self, columns: Sequence[Tensor]) -> Labelled:
        """The figures over all images, by exact sums."""
        loss, logits, there = columns
        answers = logits >= 0
        hits, total = int((answers & there).sum()), int(answers.sum()) + int(there.sum())
        precisions = [average_precision(logits[:, c], there[:, c]) for c in range(there.shape[1])]
        known = [value for value in precisions if not math.isnan(value)]
        nothing = loss.new_zeros(len(loss), dtype=torch.int64)
        return Labelled(
            accuracy=int((answers == there).sum()) / max(1, there.numel()),
            loss=math.fsum(loss.tolist()) / len(loss),
            images=len(loss),
            labels=nothing,
            predictions=nothing,
            map=math.fsum(known) / max(1, len(known)),
            f1=2 * hits / total if total else 1.0,
            ap=precisions,
        )

    def figures(self, evaluation: Evaluation) -> dict[str, float]:
        """Loss, share of right answers, F1, mean average precision."""
        assert isinstance(evaluation, Labelled)
        return {"loss": evaluation.loss, "accuracy": evaluation.accuracy, "f1": evaluation.f1, "map": evaluation.map}

    def details(self, evaluation: Evaluation, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """The average precision of each class."""
        assert isinstance(evaluation, Labelled)
        shares = [None if math.isnan(share) else share for share in evaluation.ap]
        return [{"class": name, "ap": share} for name, share in zip(class_names, shares, strict=True)]

    def describe(self, figures: Figures, images: int) -> str:
        """mAP 71.20 %, F1 68.10 %, 93.10 % of the answers right, loss 0.1234"""
        return (
            f"mAP {100 * figures['map']:.2f} %, F1 {100 * figures['f1']:.2f} %, {100 * figures['accuracy']:.2f} % of "
            f"the answers right, loss {figures['loss']:.4f}"
        )

    def picture(
        self, evaluation: Evaluation, class_names: Sequence[str], paths: Sequence[Path], model: Any, samples: Any
    ) -> None:
        """The first test images above their labels and the model's answers."""
        from ..viz.rows import rows

        found = []
        for index, image in first_images(model, samples):
            there = samples.targets.there[index]
            labels = [name for name, one in zip(class_names, there, strict=True) if one]
            answers = [name for name, share in _shares(model, image, class_names) if share >= 0.5]
            found.append((image, _written(labels), _written(answers)))
        for path in paths:
            rows(found, ("image", "labels", "answer"), path)

    def answer(self, model: Any, image: Image.Image) -> Answer:
        """The classes whose probability is a half or more, and the probability of each."""
        names = model.class_names or tuple(map(str, range(model.num_classes)))
        found = sorted(_shares(model, image, names), key=lambda item: -item[1])
        record = {
            "labels": [name for name, share in found if share >= 0.5],
            "probabilities": dict(found),
        }
        return Answer(record, [f"{100 * share:6.2f} %  {name}" for name, share in found], {})


@torch.no_grad()
def _shares(model: Any, image: Image.Image, names: Sequence[str]) -> list[tuple[str, float]]:
    """The probability of each class."""
    pixels = model.preprocess(image)[None].to(model.device, model.dtype)
    return list(zip(names, model(pixels)[0].double().sigmoid().tolist(), strict=True))


def _written(names: Sequence[str]) -> Image.Image:
    """The names, one below the other, as a picture."""
    from PIL import ImageDraw

    paper = Image.new("RGB", (96, 96), "white")
    text = "\n".join(name if name.isascii() else name.encode("ascii", "backslashreplace").decode() for name in names)
    ImageDraw.Draw(paper).multiline_text((4, 4), text or "none", fill="black")
    return paper


def average_precision(scores: Tensor, there: Tensor) -> float:
    """sum over thresholds of (R_i - R_i-1) P_i, of scores [n] and which are there [n]; NaN where none is. Equal scores
    are one threshold."""
    count = int(there.sum())
    if not count:
        return math.nan
    order = scores.argsort(descending=True, stable=True)
    hits = there[order].long().cumsum(0)
    ranked = scores[order]
    last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool, device=ranked.device)])
    places = last.nonzero()[:, 0]
    found = hits[places]
    gained = torch.diff(found, prepend=found.new_zeros(1))
    return math.fsum((gained.double() / count * found.double() / (places + 1)).tolist())


TASK = MultiLabel()
