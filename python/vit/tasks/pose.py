"""Key points of a person or thing, by a heat map for each: cross entropy over the map, PCK and OKS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..preprocess import Preprocess
from .task import Answer, Evaluation, Figures, Task, as_map, check_loss, first_images

SIGMA = 1.5  # deviation of a target's Gaussian, in cells of the heat map
NEAR = 0.1  # of the longer side of the box: so far from its label a point counts as found


@dataclass(frozen=True)
class Posed(Evaluation):
    """`accuracy` and pck are the share of labelled points that are found, `loss` the mean over these points.

    oks: the mean of the images' object key-point similarity; found: of each point its share, NaN where none is labelled
    """

    oks: float = 0.0
    pck: float = 0.0
    found: list[float] = field(default_factory=list)


class Pose(Task):
    """Images [B, C, H, W] -> heat maps [B, K, h, w], against points [B, K, 5]: x and y as shares of the image, how well
    it is seen (0: not labelled), and as shares of the image's height the spread of what people mark and the longer side
    of the box (vit.data.targets.KeyPoints).

    Each map is a distribution over its cells; that of a label is a Gaussian. As in ViTPose (arXiv:2204.12484) a few
    stages that double the sides (`decoder`) make it finer than the patches.
    """

    metric, metric_name = "oks", "OKS"
    monitored = ("train_cross_entropy", "train_oks")
    picture_name = "poses"
    targets, needs = "key_points", "key points"
    data = "a folder with images/ and key points in COCO's JSON"
    arch = {"global_pool": ""}  # noqa: RUF012 (read only)
    head = {"decoder": [256, 256]}  # noqa: RUF012 (read only)

    def prepare(self, preprocess: Preprocess) -> Preprocess:
        """Nothing is cut off, and nobody is stretched."""
        return replace(preprocess, crop_pct=1.0, crop_mode="border")

    def arrange(self, outputs: Tensor, model: Any) -> Tensor:
        """The heat maps [B, K, rows, columns]."""
        return as_map(outputs, model)

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float, kind: str = "ce") -> Tensor:
        """Cross entropy of the heat maps and the Gaussians in float32, the mean over the points that are labelled."""
        check_loss("pose", kind, "ce")
        labelled = targets[..., 2] > 0
        return (entropies(outputs.float(), targets, smoothing) * labelled).sum() / labelled.sum().clamp(min=1)

    @torch.no_grad()
    def monitor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Plain cross entropy and object key-point similarity: float32 [2]."""
        maps = outputs.detach().float()
        similarity = oks(distances(peaks(maps)[0], targets, maps.shape), targets, maps.shape[2])
        known = similarity[~similarity.isnan()]
        return torch.stack([self.loss(maps, targets, 0.0), known.sum() / max(1, len(known))])

    def measure(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Per image: its loss over all labelled points and its similarity (float64); per point whether it is labelled,
        and whether it is found (int64 [B, K])."""
        maps, targets = outputs.double().cpu(), targets.double()
        labelled = targets[..., 2] > 0
        loss = (entropies(maps, targets) * labelled).sum(dim=1)
        away = distances(peaks(maps)[0], targets, maps.shape)
        near = (away <= NEAR * targets[..., 4] * maps.shape[2]) & labelled
        return loss, oks(away, targets, maps.shape[2]), labelled.long(), near.long()

    def summarize(self, columns: Sequence[Tensor]) -> Posed:
        """The figures over all images and points, by exact sums."""
        loss, similarity, labelled, near = columns
        known = similarity[~similarity.isnan()].tolist()
        of_point, of_found = labelled.sum(dim=0).tolist(), near.sum(dim=0).tolist()
        total, nothing = max(1, sum(of_point)), loss.new_zeros(len(loss), dtype=torch.int64)
        share = sum(of_found) / total
        return Posed(
            accuracy=share,
            loss=math.fsum(loss.tolist()) / total,
            images=len(loss),
            labels=nothing,
            predictions=nothing,
            oks=math.fsum(known) / max(1, len(known)),
            pck=share,
            found=[hit / count if count else math.nan for hit, count in zip(of_found, of_point, strict=True)],
        )

    def figures(self, evaluation: Evaluation) -> dict[str, float]:
        """Loss, object key-point similarity, share of points found."""
        assert isinstance(evaluation, Posed)
        return {"loss": evaluation.loss, "oks": evaluation.oks, "pck": evaluation.pck}

    def details(self, evaluation: Evaluation, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Of each point how often it is found."""
        assert isinstance(evaluation, Posed)
        shares = [None if math.isnan(share) else share for share in evaluation.found]
        return [{"class": name, "pck": share} for name, share in zip(class_names, shares, strict=True)]

    def describe(self, figures: Figures, images: int) -> str:
        """OKS 71.20 %, 93.10 % of the points found, loss 0.1234"""
        return (
            f"OKS {100 * figures['oks']:.2f} %, {100 * figures['pck']:.2f} % of the points found (PCK at {NEAR:g}), "
            f"loss {figures['loss']:.4f}"
        )

    def picture(
        self, evaluation: Evaluation, class_names: Sequence[str], paths: Sequence[Path], model: Any, samples: Any
    ) -> None:
        """The first test images with their labels and with the model's answers."""
        from ..viz.points import marked
        from ..viz.rows import rows

        found = []
        for index, image in first_images(model, samples):
            labels = samples.targets.points[index]
            points = predicted(model, image)[0]
            answers = [place if seen else None for place, seen in zip(points, labels[:, 2] > 0, strict=True)]
            truth = [tuple(row[:2]) if row[2] > 0 else None for row in labels.tolist()]
            found.append((image, marked(image, truth, class_names), marked(image, answers, class_names)))
        for path in paths:
            rows(found, ("image", "labels", "answer"), path)

    def answer(self, model: Any, image: Image.Image) -> Answer:
        """Each point's place in pixels of the picture, the middle of the first being 0.5, and how much of its heat map
        is there. Of a part of a picture (a person in its box) the places are those in the whole."""
        from ..viz.points import marked

        left, top = image.info.get("origin", (0, 0))
        image = model.preprocess.convert(image)
        points, shares = predicted(model, image)
        names = model.class_names or tuple(map(str, range(model.num_classes)))
        found = [
            {"point": name, "x": x + left, "y": y + top, "confidence": share}
            for name, (x, y), share in zip(names, points, shares, strict=True)
        ]
        record = {"points": found, "box": [left, top, image.width, image.height]}
        lines = [f"{one['x']:8.1f} {one['y']:8.1f}  {100 * one['confidence']:5.1f} %  {one['point']}" for one in found]
        return Answer(record, lines, {".png": marked(image, points, names)})


def gaussians(targets: Tensor, size: Sequence[int]) -> Tensor:
    """A Gaussian around each point, its sum 1: points [B, K, 5] -> [B, K, h, w], by size (..., h, w)."""
    height, width = size[-2:]
    across, down = ((torch.arange(count, device=targets.device) + 0.5) for count in (width, height))
    x = (across - targets[..., :1] * width).square()  # [B, K, w]
    y = (down - targets[..., 1:2] * height).square()  # [B, K, h]
    # The nearest cell is subtracted, so that no sum is 0 of a point outside.
    x, y = ((one - one.amin(dim=-1, keepdim=True)).mul(-0.5 / SIGMA**2).softmax(dim=-1) for one in (x, y))
    return y[..., :, None] * x[..., None, :]


def entropies(maps: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """-sum t log softmax(map) of each point [B, K], t being its Gaussian, `smoothing` of it spread over all cells."""
    shares = gaussians(targets, maps.shape).flatten(2)
    shares = shares * (1 - smoothing) + smoothing / shares.shape[2]
    return -(shares * maps.flatten(2).log_softmax(dim=2)).sum(dim=2)


def peaks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Where heat maps [B, K, h, w] are largest, in cells from the upper left corner [B, K, 2] (x, y), and which share
    of the map the 3 x 3 cells there hold [B, K].

    Between the cells by one step of Newton on the logarithm of the map (DARK, arXiv:1910.06278), which the logits are
    but for a constant: a parabola through the neighbours along each axis. A step is at most half a cell; there is none
    at the border.
    """
    height, width = maps.shape[2:]
    best = maps.flatten(2).argmax(dim=2)
    rows, columns = best // width, best % width
    around = torch.nn.functional.pad(maps, (1, 1, 1, 1), mode="replicate")
    shares = torch.nn.functional.pad(maps.flatten(2).softmax(dim=2).view_as(maps), (1, 1, 1, 1))

    def at(of: Tensor, down: int, right: int) -> Tensor:
        place = (rows + 1 + down) * (width + 2) + columns + 1 + right
        return of.flatten(2).gather(2, place[..., None])[..., 0]

    def step(before: Tensor, after: Tensor, inside: Tensor) -> Tensor:
        bend = 2 * at(around, 0, 0) - before - after
        return torch.where(inside & (bend > 1e-6), 0.5 * (after - before) / bend.clamp(min=1e-6), 0.0).clamp(-0.5, 0.5)

    x = columns + 0.5 + step(at(around, 0, -1), at(around, 0, 1), (columns > 0) & (columns < width - 1))
    y = rows + 0.5 + step(at(around, -1, 0), at(around, 1, 0), (rows > 0) & (rows < height - 1))
    share = torch.stack([at(shares, down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]).sum(dim=0)
    return torch.stack([x, y], dim=2), share


def distances(points: Tensor, targets: Tensor, size: Sequence[int]) -> Tensor:
    """From the points [B, K, 2], in cells, to their labels: [B, K] in cells, of maps (..., h, w) with square ones."""
    scale = torch.tensor([size[-1], size[-2]], dtype=targets.dtype, device=targets.device)
    return (points - targets[..., :2] * scale).square().sum(dim=2).sqrt()


def oks(away: Tensor, targets: Tensor, height: int) -> Tensor:
    """Object key-point similarity [B] of COCO: the mean of exp(-d^2 / 2 (s k)^2) over the labelled points, NaN without.

    away: d [B, K] in cells; targets[..., 3]: s k, the root of the area times twice the point's sigma, as a share of the
    map's height
    """
    spread = (targets[..., 3] * height).clamp(min=1e-9)
    labelled = targets[..., 2] > 0
    like = torch.exp(-0.5 * (away / spread).square()) * labelled
    count = labelled.sum(dim=1)
    return torch.where(count > 0, like.sum(dim=1) / count.clamp(min=1), math.nan)


@torch.no_grad()
def predicted(model: Any, image: Image.Image) -> tuple[list[tuple[float, float]], list[float]]:
    """The points of a picture in its pixels, and the confidence of each."""
    from ..support import affine

    pixels = model.preprocess(image)[None].to(model.device, model.dtype)
    maps = TASK.arrange(model(pixels), model).double().cpu()
    points, shares = peaks(maps)
    place, (width, height) = model.preprocess.place(image.size)
    across, down = width / maps.shape[3], height / maps.shape[2]
    found = affine.found(place, points[0].numpy() * (across, down))
    return [(float(x), float(y)) for x, y in found], [float(share) for share in shares[0]]


TASK = Pose()
