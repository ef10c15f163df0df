"""How far away each pixel is: scale-invariant loss, AbsRel and delta1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..preprocess import Preprocess
from .task import Answer, Evaluation, Figures, Task, as_map, first_images, stretched, whole

UNIT = 1000.0  # depths of this many units have the logit 0: 1 m in files that count millimetres
LARGEST = 65535  # of a PNG with 16 bits
INVARIANT = 0.5  # share of the common factor that costs nothing


@dataclass(frozen=True)
class Measured(Evaluation):
    """Means over the images of their means over the pixels whose depth d is known, the answer being p: absrel of
    |p - d| / d, delta1 the share with max(p / d, d / p) < 1.25. `accuracy` is delta1."""

    absrel: float = 0.0
    delta1: float = 0.0


class Depth(Task):
    """Images [B, C, H, W] -> logarithms of depths [B, 1, rows, columns], against depths float32 [B, H, W], 0 where they
    are not known. They are compared at the size of the labels, to which they are interpolated (bilinear)."""

    metric, metric_name = "delta1", "delta1"
    monitored = ("train_scale_invariant_loss", "train_delta1")
    picture_name = "depths"
    targets, needs = "depths", "a depth for each pixel"
    data = "a folder with images/ and depths/"
    arch = {"global_pool": ""}  # noqa: RUF012 (read only)
    head = {"decoder": [256, 256]}  # noqa: RUF012 (read only)

    def prepare(self, preprocess: Preprocess) -> Preprocess:
        """A border that is cut off has depths, too."""
        return replace(preprocess, crop_pct=1.0)

    def arrange(self, outputs: Tensor, model: Any) -> Tensor:
        """The logarithms as a map [B, 1, rows, columns]."""
        return as_map(outputs, model)

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float, kind: str = "ce") -> Tensor:
        """The mean over the images of mean(g^2) - mean(g)^2 / 2, g = log p - log d, in float32 (arXiv:1406.2283)."""
        if kind != "ce":
            raise ValueError(f"vit: --task depth has a loss of its own; leave out --loss {kind}")
        return scale_invariant(*gaps(outputs.float(), targets)).mean()

    @torch.no_grad()
    def monitor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, and delta1: float32 [2]."""
        gap, known = gaps(outputs.detach().float(), targets)
        return torch.stack([scale_invariant(gap, known).mean(), near(gap, known).mean()])

    def measure(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Loss, AbsRel and delta1 of each image (float64), and how many of its pixels are known."""
        gap, known = gaps(outputs.double().cpu(), targets.double())
        relative = (gap.exp() - 1).abs() * known
        count = known.sum(dim=(1, 2))
        return scale_invariant(gap, known), relative.sum(dim=(1, 2)) / count.clamp(min=1), near(gap, known), count

    def summarize(self, columns: Sequence[Tensor]) -> Measured:
        """The means over the images with a known pixel, by exact sums."""
        *figures, count = columns
        known = count > 0
        total, nothing = max(1, int(known.sum())), count.new_zeros(len(count), dtype=torch.int64)
        loss, absrel, delta1 = (math.fsum(figure[known].tolist()) / total for figure in figures)
        return Measured(
            accuracy=delta1,
            loss=loss,
            images=len(count),
            labels=nothing,
            predictions=nothing,
            absrel=absrel,
            delta1=delta1,
        )

    def figures(self, evaluation: Evaluation) -> dict[str, float]:
        """Loss, AbsRel, delta1."""
        assert isinstance(evaluation, Measured)
        return {"loss": evaluation.loss, "absrel": evaluation.absrel, "delta1": evaluation.delta1}

    def describe(self, figures: Figures, images: int) -> str:
        """delta1 91.20 %, AbsRel 0.1103, loss 0.0234"""
        return f"delta1 {100 * figures['delta1']:.2f} %, AbsRel {figures['absrel']:.4f}, loss {figures['loss']:.4f}"

    def picture(
        self, evaluation: Evaluation, class_names: Sequence[str], paths: Sequence[Path], model: Any, samples: Any
    ) -> None:
        """The first test images beside their depths and the model's answers, in one grey scale a row."""
        from ..viz.rows import rows

        found = []
        for index, image in first_images(model, samples):
            truth, answer = np.asarray(samples.targets.picture(index)), predicted(model, image)
            known = truth[truth > 0]
            ends = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
            found.append((image, *(shaded(depths, *ends) for depths in (truth, answer))))
        for path in paths:
            rows(found, ("image", "depths", "answer"), path)

    def answer(self, model: Any, image: Image.Image) -> Answer:
        """The nearest, middle and farthest depth, and all of them, in the unit of the training's files: a PNG of 16
        bits, and one to look at, the nearer the brighter."""
        depths = predicted(model, model.preprocess.convert(image))
        low, middle, high = (float(np.quantile(depths, share)) for share in (0.0, 0.5, 1.0))
        record = {"nearest": low, "median": middle, "farthest": high}
        words = [f"{value:10.1f}  {name}" for name, value in record.items()]
        deep = Image.fromarray(np.rint(depths).clip(1, LARGEST).astype(np.uint16))
        return Answer(record, words, {".png": deep, "-painted.png": Image.fromarray(shaded(depths, low, high))})


def gaps(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p - log d at each pixel [B, H, W], 0 where d is not known, and where it is."""
    known = targets > 0
    logs = stretched(outputs, targets.shape[1:])[:, 0]
    gap = logs - (torch.where(known, targets, UNIT) / UNIT).log()
    return torch.where(known, gap, 0.0), known


def scale_invariant(gap: Tensor, known: Tensor) -> Tensor:
    """mean(g^2) - mean(g)^2 / 2 of each image [B], over the pixels that are known; 0 without any."""
    count = known.sum(dim=(1, 2)).clamp(min=1)
    return gap.square().sum(dim=(1, 2)) / count - INVARIANT * (gap.sum(dim=(1, 2)) / count).square()


def near(gap: Tensor, known: Tensor) -> Tensor:
    """The share of the known pixels with max(p / d, d / p) < 1.25, of each image [B]."""
    right = (gap.abs() < math.log(1.25)) & known
    return right.sum(dim=(1, 2)) / known.sum(dim=(1, 2)).clamp(min=1).to(gap.dtype)


@torch.no_grad()
def predicted(model: Any, image: Image.Image) -> np.ndarray:
    """The depths of all pixels of a picture, float32 [height, width]. The model sees it squeezed to its own size."""
    logs = as_map(model(whole(model, image)), model).float()
    depths = UNIT * stretched(logs, (image.height, image.width))[0, 0].exp()
    return np.asarray(depths.cpu().numpy())


def shaded(depths: np.ndarray, low: float, high: float) -> np.ndarray:
    """Depths as grey levels uint8, `low` white and `high` black; black where nothing is known."""
    levels = 255 * (high - depths) / max(high - low, 1e-6)
    return np.where(depths > 0, levels.clip(0, 255), 0).astype(np.uint8)


TASK = Depth()
