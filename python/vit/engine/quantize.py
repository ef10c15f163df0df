"""What quantization costs and gains: top-1, logits, speed and memory beside float32, and which layers matter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .engine import Engine
from .freeze import quantizable


@dataclass(frozen=True)
class Figures:
    """One engine: share of right answers, mean cosine of its logits with float32's, and what it takes."""

    dtype: str
    top1: float
    cosine: float
    images_per_second: float
    weight_bytes: int

    def record(self) -> dict[str, Any]:
        return asdict(self)


def figures(engines: Sequence[Engine], images: Tensor, labels: Tensor, batch: int, rounds: int = 5) -> list[Figures]:
    """The figures of engines, of which the first is float32; they are timed in turn on the first `batch` images."""
    logits = [_logits(engine, images, batch) for engine in engines]
    speeds = _speeds(engines, images[:batch], rounds)
    return [
        Figures(
            f"{engine.weights} weights" if engine.weights else engine.dtype,
            (found.argmax(-1) == labels).double().mean().item(),
            cosine(found, logits[0]),
            speed,
            engine.memory["weights"],
        )
        for engine, found, speed in zip(engines, logits, speeds, strict=True)
    ]


def cosine(a: Tensor, b: Tensor) -> float:
    """Mean over images of the cosine between logits [B, classes]."""
    return torch.cosine_similarity(a.double(), b.double(), dim=-1).mean().item()


def sensitivity(
    model: nn.Module,
    images: Tensor,
    batch: int,
    make: Callable[[Sequence[str]], Engine],
    advance: Callable[[str], None] = lambda layer: None,
) -> list[tuple[str, float]]:
    """(layer, cosine with the float32 logits when it alone is quantized), the most sensitive layer first; make(exclude)
    gives the engine in which those layers are not."""
    truth = _logits(Engine(model), images, batch)
    layers = quantizable(len(model.blocks))  # type: ignore[arg-type]
    found = []
    for layer in layers:
        advance(layer)
        others = [other for other in layers if other != layer]
        found.append((layer, cosine(_logits(make(others), images, batch), truth)))
    return sorted(found, key=lambda pair: pair[1])


def objections(
    plain: Figures, quantized: Figures, max_drop: float, min_cosine: float, for_speed: bool = True
) -> list[str]:
    """Why the quantized engine should not be used; nothing when it should."""
    reasons = []
    if for_speed and quantized.images_per_second <= plain.images_per_second:
        speeds = f"{quantized.images_per_second:.1f} images/s, float32 {plain.images_per_second:.1f}"
        reasons.append(f"it is not faster: {speeds}")
    if not plain.top1 - quantized.top1 <= max_drop:  # so that NaN, here and below, is an objection
        drop = f"{100 * plain.top1:.2f} % to {100 * quantized.top1:.2f} %"
        reasons.append(f"top-1 falls from {drop}, more than the limit of {100 * max_drop:.2f} points")
    if not quantized.cosine >= min_cosine:
        reasons.append(f"the cosine of its logits is {quantized.cosine:.5f}, below the limit of {min_cosine:g}")
    return reasons


def _logits(engine: Engine, images: Tensor, batch: int) -> Tensor:
    return torch.cat([torch.as_tensor(engine(part)) for part in images.split(batch)])


def _speeds(engines: Sequence[Engine], images: Tensor, rounds: int) -> list[float]:
    """Images per second: the median over rounds in which the engines take turns, after one that warms up."""
    times: list[list[float]] = [[] for _ in engines]
    for turn in range(rounds + 1):
        for engine, spent in zip(engines, times, strict=True):
            begin = time.perf_counter()
            calls = 0
            while time.perf_counter() - begin < 0.1:
                engine(images)
                calls += 1
            if turn:
                spent.append((time.perf_counter() - begin) / calls)
    return [len(images) / statistics.median(spent) for spent in times]
