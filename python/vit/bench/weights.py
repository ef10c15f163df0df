"""Weights as a trained network has them, drawn from a seed: for measuring quantization and comparing runtimes.

Freshly initialised weights flatter low precision: nothing is large. Trained Vision Transformers have heavy-tailed
weights, output channels of unlike size, and layer norms that amplify a few channels many times (arXiv:2208.07339 and
arXiv:2211.10438 describe it for language models, arXiv:2111.13824 for Vision Transformers).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

#: Log-normal spread of the elements of a matrix (kurtosis 8, a normal distribution has 3), of its rows, and of gains.
TAIL, ROWS, GAINS = 0.5, 0.25, 0.3

#: One channel in so many of a layer norm is amplified so many times.
OUTLIER_EVERY, OUTLIER_GAIN = 128, 6.0


def seeded_state(shapes: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """A state dict with the keys and shapes of `shapes` (such as model.state_dict()) in float32 on the CPU.

    A tensor depends on its name, its shape and the seed alone. Matrices have standard deviation 1 / sqrt(inputs), so
    that activations keep their size through any depth.
    """
    return {name: _tensor(name, tuple(like.shape), seed) for name, like in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    if name in ("cls_token", "pos_embed", "reg_token"):
        return 0.1 * normal(*shape)
    if name.endswith("bias"):
        return 0.1 * normal(*shape)
    if len(shape) == 1:  # the gain of a layer norm, or a layer scale
        gain = torch.exp(GAINS * normal(*shape))
        gain[normal(*shape).topk(len(gain) // OUTLIER_EVERY).indices] *= OUTLIER_GAIN
        return gain
    rows = torch.exp(ROWS * normal(shape[0])).reshape(-1, *[1] * (len(shape) - 1))
    tails = torch.exp(TAIL * normal(*shape))
    variance = math.exp(2 * TAIL**2 + 2 * ROWS**2)
    return normal(*shape).mul_(tails).mul_(rows).mul_((math.prod(shape[1:]) * variance) ** -0.5)
