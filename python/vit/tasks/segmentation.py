"""One class per pixel: cross entropy and Dice loss, mean intersection over union."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.targets import VOID
from ..preprocess import Preprocess
from .task import Answer, Evaluation, Figures, Task, as_map, check_loss, first_images, stretched, whole


@dataclass(frozen=True)
class Segmented(Evaluation):
    """`accuracy` is the share of right pixels, `loss` the mean over all pixels. iou: of each class, NaN where neither
    labels nor answers have it; miou: the mean of the others."""

    miou: float = 0.0
    iou: list[float] = field(default_factory=list)


class Segmentation(Task):
    """Images [B, C, H, W] -> logits [B, classes, rows, columns], against masks int64 [B, H, W].

    A map of the patches, as the linear decoder of "Segmenter" (arXiv:2105.05633) gives it, or the finer one of a model
    with `decoder`. It is compared at the size of the masks, to which it is interpolated (bilinear).
    """

    metric, metric_name = "miou", "mIoU"
    monitored = ("train_cross_entropy", "train_accuracy")
    picture_name = "masks"
    targets, needs = "masks", "a class for each pixel"
    data = "a folder with images/ and masks/"
    arch = {"global_pool": ""}  # noqa: RUF012 (read only): the head answers for every token

    def prepare(self, preprocess: Preprocess) -> Preprocess:
        """A border that is cut off has classes, too."""
        return replace(preprocess, crop_pct=1.0)

    def arrange(self, outputs: Tensor, model: Any) -> Tensor:
        """A map of logits [B, classes, rows, columns]."""
        return as_map(outputs, model)

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float, kind: str = "ce") -> Tensor:
        """Cross entropy in float32, the mean over the pixels that have a class; "ce_dice": that and the Dice loss."""
        check_loss("segmentation", kind, "ce", "ce_dice")
        count = (targets != VOID).sum().clamp(min=1)
        logits = stretched(outputs.float(), targets.shape[1:])
        loss = F.cross_entropy(logits, targets, ignore_index=VOID, label_smoothing=smoothing, reduction="sum") / count
        return loss + dice_loss(logits, targets) if kind == "ce_dice" else loss

    @torch.no_grad()
    def monitor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Plain cross entropy and share of right pixels: float32 [2]."""
        logits = stretched(outputs.detach().float(), targets.shape[1:])
        known = targets != VOID
        count = known.sum().clamp(min=1)
        own = logits.log_softmax(dim=1).gather(1, targets.clamp(max=logits.shape[1] - 1)[:, None])[:, 0]
        right = (logits.argmax(dim=1) == targets) & known
        return torch.stack([-(own * known).sum() / count, right.sum() / count])

    def measure(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Per image: its loss over all pixels (float64) and their number; per class the pixels that are right, that
        were answered, and that are labelled (int64 [B, classes])."""
        logits, classes = stretched(outputs.double().cpu(), targets.shape[1:]), outputs.shape[1]
        loss = F.cross_entropy(logits, targets, ignore_index=VOID, reduction="none").sum(dim=(1, 2))
        known = targets != VOID
        answers = logits.argmax(dim=1)
        hot = [F.one_hot(part.clamp(max=classes - 1), classes) * known[..., None] for part in (answers, targets)]
        right = (hot[0] * hot[1]).sum(dim=(1, 2))
        return loss, known.sum(dim=(1, 2)), right, hot[0].sum(dim=(1, 2)), hot[1].sum(dim=(1, 2))

    def summarize(self, columns: Sequence[Tensor]) -> Segmented:
        """The figures over the pixels of all images, by exact sums."""
        loss, pixels, *counts = columns
        right, answered, labelled = (part.sum(dim=0) for part in counts)
        union = answered + labelled - right
        iou = [int(r) / int(u) if u else math.nan for r, u in zip(right, union, strict=True)]
        there = [value for value in iou if not math.isnan(value)]
        total, nothing = max(1, int(pixels.sum())), loss.new_zeros(len(loss), dtype=torch.int64)
        return Segmented(
            accuracy=int(right.sum()) / total,
            loss=math.fsum(loss.tolist()) / total,
            images=len(loss),
            labels=nothing,
            predictions=nothing,
            miou=math.fsum(there) / max(1, len(there)),
            iou=iou,
        )

    def figures(self, evaluation: Evaluation) -> dict[str, float]:
        """Loss, share of right pixels, mean intersection over union."""
        assert isinstance(evaluation, Segmented)
        return {"loss": evaluation.loss, "accuracy": evaluation.accuracy, "miou": evaluation.miou}

    def details(self, evaluation: Evaluation, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """The intersection over union of each class."""
        assert isinstance(evaluation, Segmented)
        shares = [None if math.isnan(share) else share for share in evaluation.iou]
        return [{"class": name, "iou": share} for name, share in zip(class_names, shares, strict=True)]

    def describe(self, figures: Figures, images: int) -> str:
        """mIoU 71.20 %, pixels 93.10 %, loss 0.1234"""
        return (
            f"mIoU {100 * figures['miou']:.2f} %, {100 * figures['accuracy']:.2f} % of the pixels, "
            f"loss {figures['loss']:.4f}"
        )

    def picture(
        self, evaluation: Evaluation, class_names: Sequence[str], paths: Sequence[Path], model: Any, samples: Any
    ) -> None:
        """The first test images beside their masks and the model's answers."""
        from ..viz.masks import legend, painted
        from ..viz.rows import rows

        found = []
        for index, image in first_images(model, samples):
            mask = samples.targets.picture(index)
            found.append((image, *map(painted, (mask, predicted_whole(model, image)))))
        for path in paths:
            rows(found, ("image", "classes", "answer"), path, legend(class_names))

    def answer(self, model: Any, image: Image.Image) -> Answer:
        """The shares of the classes, and the class of each pixel: as the values of a picture with a palette, and in
        colours over the image."""
        from ..viz.masks import colours, painted

        image = model.preprocess.convert(image)
        mask = predicted_whole(model, image)
        names = model.class_names or tuple(map(str, range(model.num_classes)))
        counts = mask.flatten().bincount(minlength=len(names)).tolist()
        shares = {name: count / mask.numel() for name, count in zip(names, counts, strict=True) if count}
        classes = Image.fromarray(mask.numpy())
        classes.putpalette(colours(256).tobytes())
        over = Image.blend(image.convert("RGB"), Image.fromarray(painted(mask)), 0.5)
        largest = sorted(shares.items(), key=lambda item: -item[1])
        lines = [f"{100 * share:6.2f} %  {name}" for name, share in largest]
        return Answer({"shares": shares}, lines, {".png": classes, "-painted.png": over})


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - the mean over the classes of 2 sum p t / (sum p + sum t), over the pixels of a batch that have a class
    (arXiv:1606.04797): every class counts alike, however few pixels it has. logits [B, classes, H, W], targets
    [B, H, W]"""
    classes = logits.shape[1]
    known = (targets != VOID)[:, None]
    shares = logits.softmax(dim=1) * known
    hot = F.one_hot(targets.clamp(max=classes - 1), classes).movedim(3, 1) * known
    both, all_of_them = (shares * hot).sum(dim=(0, 2, 3)), (shares + hot).sum(dim=(0, 2, 3))
    return 1 - ((2 * both + 1) / (all_of_them + 1)).mean()


@torch.no_grad()
def predicted_whole(model: Any, image: Any) -> Tensor:
    """The classes of all pixels of a picture, uint8 [height, width]. The model sees it squeezed to its own size."""
    logits = as_map(model(whole(model, image)), model).float()
    return stretched(logits, (image.height, image.width)).argmax(dim=1)[0].to(torch.uint8).cpu()


TASK = Segmentation()
