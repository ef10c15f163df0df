"""One class per pixel, by a linear head on every patch: cross entropy, mean intersection over union."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .task import Evaluation, Figures

VOID = 255  # pixels of no class, which count nowhere


@dataclass(frozen=True)
class Segmented(Evaluation):
    """`accuracy` is the share of right pixels, `loss` the mean over all pixels. iou: of each class, NaN where neither
    labels nor answers have it; miou: the mean of the others."""

    miou: float = 0.0
    iou: list[float] = field(default_factory=list)


class Segmentation:
    """Images [B, C, H, W] -> logits [B, classes, rows, columns] of the patches, against masks int64 [B, H, W].

    Logits are compared at the size of the masks, to which they are interpolated (bilinear): the linear decoder of
    "Segmenter" (arXiv:2105.05633).
    """

    metric = "miou"
    monitored = ("train_cross_entropy", "train_accuracy")
    picture_name = "masks"
    needs_masks = True
    arch: dict[str, Any] = {"global_pool": ""}  # noqa: RUF012 (read only): the head answers for every token

    def arrange(self, outputs: Tensor, model: Any) -> Tensor:
        """Logits of the tokens [B, N, classes] -> of the patches [B, classes, rows, columns]."""
        rows, columns = model.patch_embed.grid_size
        return outputs[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (rows, columns))

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float, kind: str = "ce") -> Tensor:
        """Cross entropy in float32, the mean over the pixels that have a class."""
        if kind != "ce":
            raise ValueError(f"vit: --task segmentation has the loss ce, not {kind}")
        count = (targets != VOID).sum().clamp(min=1)
        logits = enlarged(outputs.float(), targets)
        return F.cross_entropy(logits, targets, ignore_index=VOID, label_smoothing=smoothing, reduction="sum") / count

    @torch.no_grad()
    def monitor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Plain cross entropy and share of right pixels: float32 [2]."""
        logits = enlarged(outputs.detach().float(), targets)
        known = targets != VOID
        count = known.sum().clamp(min=1)
        own = logits.log_softmax(dim=1).gather(1, targets.clamp(max=logits.shape[1] - 1)[:, None])[:, 0]
        right = (logits.argmax(dim=1) == targets) & known
        return torch.stack([-(own * known).sum() / count, right.sum() / count])

    def measure(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Per image: its loss over all pixels (float64) and their number; per class the pixels that are right, that
        were answered, and that are labelled (int64 [B, classes])."""
        logits, classes = enlarged(outputs.double().cpu(), targets), outputs.shape[1]
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
        total, nothing = max(1, int(pixels.sum())), torch.zeros(len(loss), dtype=torch.int64)
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

    def better(self, new: Figures, old: Figures) -> bool:
        """A higher mean intersection over union, or the same with a smaller loss."""
        losses = [-loss if math.isfinite(loss) else -math.inf for loss in (new["loss"], old["loss"])]
        return (new["miou"], losses[0]) > (old["miou"], losses[1])

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
        from ..viz.masks import answers

        rows = []
        for index in range(min(6, len(samples))):
            image = model.preprocess.convert(samples.image(index))
            rows.append((image, samples.mask(index), predicted(model, image)))
        for path in paths:
            answers(rows, class_names, path)


def enlarged(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [B, classes, h, w] at the size of the targets [B, H, W]."""
    size = (int(targets.shape[1]), int(targets.shape[2]))
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


@torch.no_grad()
def predicted(model: Any, image: Any) -> Tensor:
    """The classes of a picture's pixels, at the size that the model sees: uint8 [H, W]."""
    pixels = model.preprocess(image)[None].to(model.device, model.dtype)
    logits = TASK.arrange(model(pixels), model)
    return enlarged(logits.float(), pixels[:, 0]).argmax(dim=1)[0].to(torch.uint8).cpu()


@torch.no_grad()
def predicted_whole(model: Any, image: Any) -> Tensor:
    """The classes of all pixels of a picture, uint8 [height, width]. The model sees it squeezed to its own size, so
    nothing is cut off."""
    pixels = replace(model.preprocess, crop_pct=1.0, crop_mode="squash")(image)[None]
    logits = TASK.arrange(model(pixels.to(model.device, model.dtype)), model).float()
    size = (image.height, image.width)
    return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(dim=1)[0].to(torch.uint8).cpu()


TASK = Segmentation()
