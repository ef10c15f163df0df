"""One class per image: cross entropy, accuracy, the confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .task import Evaluation, Figures, Task, check_loss


class Classification(Task):
    """Images [B, C, H, W] -> logits [B, classes] against class indices int64 [B]."""

    metric, metric_name = "accuracy", "accuracy"
    monitored = ("train_cross_entropy", "train_accuracy")
    picture_name = "confusion"
    places = False
    targets, needs = "labels", "a class for each image"
    data = "a folder of class folders"

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float, kind: str = "ce") -> Tensor:
        """Cross entropy in float32, with `smoothing` of the target spread over all classes (arXiv:1512.00567).

        targets: class indices int64 [B], or shares of the classes float32 [B, classes]
        kind: "ce", or "bce": the sum over classes of the binary cross entropies, mean over the batch (arXiv:2110.00476)
        """
        check_loss("classification", kind, "ce", "bce")
        if kind == "bce":
            classes = outputs.shape[1]
            shares = targets if targets.ndim == 2 else F.one_hot(targets, classes).float()
            shares = shares * (1 - smoothing) + smoothing / classes
            return F.binary_cross_entropy_with_logits(outputs.float(), shares, reduction="sum") / len(outputs)
        return F.cross_entropy(outputs.float(), targets, label_smoothing=smoothing)

    @torch.no_grad()
    def monitor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Plain cross entropy, as in validation, and share of right answers: float32 [2]."""
        # As a sum of its parts: F.cross_entropy is what the training minimizes.
        likely = outputs.detach().float().log_softmax(dim=1)
        right = (likely.argmax(dim=1) == targets).float().mean()
        return torch.stack([-likely.gather(1, targets[:, None]).mean(), right])

    def measure(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Loss (float64), prediction and label of each image, whether that is among the first five, confidence."""
        logits = outputs.double().cpu()
        own = logits.gather(1, targets[:, None])
        # Of equal logits the first class is the prediction, so that a model without an opinion is no five times lucky.
        places = torch.arange(logits.shape[1], device=logits.device)
        before = (logits > own) | ((logits == own) & (places < targets[:, None]))
        fifth = (before.sum(dim=1) < 5) & own[:, 0].isfinite()
        confidence = logits.softmax(dim=1).amax(dim=1)
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(dim=1), targets, fifth, confidence

    def summarize(self, columns: Sequence[Tensor]) -> Evaluation:
        """Mean cross entropy by an exact sum (math.fsum) and share of right answers."""
        loss, predictions, labels, fifth, confidence = columns
        right = predictions == labels
        count = len(labels)
        bins = calibration_bins(confidence, right)
        return Evaluation(
            accuracy=int(right.sum()) / count,
            loss=math.fsum(loss.tolist()) / count,
            images=count,
            labels=labels,
            predictions=predictions,
            top5=int(fifth.sum()) / count,
            ece=math.fsum(images * abs(share - sure) for images, sure, share in bins) / count,
            bins=bins,
        )

    def figures(self, evaluation: Evaluation) -> dict[str, float]:
        """Loss and accuracy."""
        return {"loss": evaluation.loss, "accuracy": evaluation.accuracy}

    def describe(self, figures: Figures, images: int) -> str:
        """accuracy 97.21 % (95 % interval 93.6 to 98.8), loss 0.1234"""
        accuracy = figures["accuracy"]
        low, high = wilson(accuracy, images)
        return (
            f"accuracy {100 * accuracy:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}), "
            f"loss {figures['loss']:.4f}"
        )

    def picture(
        self, evaluation: Evaluation, class_names: Sequence[str], paths: Sequence[Path], model: Any, samples: Any
    ) -> None:
        """The confusion matrix, and beside it in calibration.png (or .pdf, .svg) the diagram of the calibration."""
        from ..viz import calibration, confusion

        for path in paths:
            confusion(evaluation.labels, evaluation.predictions, class_names, path)
            calibration(evaluation.bins, evaluation.ece, path.with_name(f"calibration{path.suffix}"))


def calibration_bins(confidence: Tensor, right: Tensor, bins: int = 15) -> tuple[tuple[int, float, float], ...]:
    """Of equal bins of the confidence [images], those that are not empty: images, mean confidence, share of right ones.

    The expected calibration error is the sum over them of (images in it / all) |share - mean confidence|.
    """
    place = (confidence.nan_to_num() * bins).long().clamp(0, bins - 1)
    found = []
    for bin in place.unique().tolist():
        inside = place == bin
        count = int(inside.sum())
        sure = math.fsum(confidence[inside].tolist()) / count
        found.append((count, sure, int(right[inside].sum()) / count))
    return tuple(found)


def per_class(evaluation: Evaluation, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each class its images, recall (its accuracy), precision and F1; None where there is nothing to divide by."""
    counts = confusion_counts(evaluation, len(class_names))
    rows = []
    for label, name in enumerate(class_names):
        hit, of_class, answered = counts[label][label], sum(counts[label]), sum(row[label] for row in counts)
        rows.append(
            {
                "class": name,
                "images": of_class,
                "recall": hit / of_class if of_class else None,
                "precision": hit / answered if answered else None,
                "f1": 2 * hit / (of_class + answered) if of_class + answered else None,
            }
        )
    return rows


def confusion_counts(evaluation: Evaluation, classes: int) -> list[list[int]]:
    """Entry [i][j] counts the images of class i that were taken for class j."""
    places = evaluation.labels * classes + evaluation.predictions
    counts: list[list[int]] = torch.bincount(places, minlength=classes * classes).view(classes, classes).tolist()
    return counts


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds a probability of which `share` of `count` trials came true, 95 % for z = 1.96.

    (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n); Wilson 1927, Journal of the American Statistical
    Association 22.
    """
    if count < 1:
        return 0.0, 1.0
    scale = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    spread = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - spread), min(1.0, middle + spread)


TASK = Classification()
