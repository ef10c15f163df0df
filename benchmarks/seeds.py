"""Two questions of the seed projects, on the CPU: python benchmarks/seeds.py [--json FILE]

How a weight is best stored: a linear layer of ViT-S's MLP (197 tokens, 384 -> 1,536), forward and backward, with the
weight [out, in] (vit.ops.linear) and [in, out] (vit.ops.matmul).

How patches are best cut: 256 images of 28 x 28 in patches of 4 x 4, by a loop over patches, by PyTorch's unfold and by
vit.model.patchify, in plain PyTorch and by the cpu backend's copy. All must give the same patches.

Each candidate runs in a process of its own, in turns with the others (vit.bench.workers).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import vit
from script import Records, raced, run
from torch import Tensor
from vit.bench.workers import Candidate
from vit.model import patchify
from vit.ops.movement import of as movement_of
from vit.support.random import normal

ROWS, INPUTS, OUTPUTS, PATCH = 197, 384, 1536, 4


def layout(kind: str) -> Candidate:
    """Forward and backward of one layer; the result is a sum by which the two are compared."""
    x = normal((ROWS, INPUTS), "x").requires_grad_()
    weight = normal((OUTPUTS, INPUTS), "weight")
    weight = (weight if kind == "[out, in]" else weight.T.contiguous()).requires_grad_()
    dy = normal((ROWS, OUTPUTS), "dy")

    def step() -> Tensor:
        y = (
            vit.ops.linear(x, weight, backend="cpu")
            if kind == "[out, in]"
            else vit.ops.matmul(x, weight, backend="cpu")
        )
        x.grad = weight.grad = None
        y.backward(dy)
        return y

    return Candidate(step, result=lambda y: float(y.double().square().mean()))


def loop(images: Tensor) -> Tensor:
    """Patch by patch, as the seeds' first versions."""
    side = images.shape[-1] // PATCH
    cut = [
        images[:, :, PATCH * i : PATCH * (i + 1), PATCH * j : PATCH * (j + 1)].flatten(1)
        for i in range(side)
        for j in range(side)
    ]
    return torch.stack(cut, dim=1)


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a loop over patches": loop,
    "torch unfold": lambda images: F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).contiguous(),
    "patchify": lambda images: patchify(images, PATCH),
    "patchify, cpu": lambda images: patchify(images, PATCH, movement_of("cpu").contiguous),
}


def cut(kind: str) -> Candidate:
    """The patches of all images; the result says whether they are the loop's."""
    images = normal((256, 1, 28, 28), "images")
    wanted = loop(images)
    return Candidate(lambda: CUTS[kind](images), result=lambda patches: bool(torch.equal(patches, wanted)))


def measure(rounds: int) -> Records:
    """A record per candidate."""
    records = []
    for what, make, kinds in (("weight", layout, ["[out, in]", "[in, out]"]), ("patches", cut, list(CUTS))):
        for kind, (times, result) in zip(kinds, raced(make, [(kind,) for kind in kinds], rounds), strict=True):
            records.append({"what": what, "kind": kind, **times, "result": result})
            print(f"{what:8s} {kind:20s} {times['ms_median']:8.3f} ms  {result}", flush=True)
    return records


if __name__ == "__main__":
    run(__doc__, measure)
