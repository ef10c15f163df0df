"""Weights as a trained network has them, drawn from a seed: for measuring quantization and comparing runtimes.

Freshly initialised weights flatter low precision: nothing is large. Trained Vision Transformers have heavy-tailed
weights, output channels of unlike size, and layer norms that amplify a few channels many times (arXiv:2208.07339 and
arXiv:2211.10438 describe it for language models, arXiv:2111.13824 for Vision Transformers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..support.random import Stream

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
    stream = Stream("seeded weights", seed, name)

    def normal(*size: int) -> Tensor:
        return torch.from_numpy(stream.standard_normal(size))

    def lognormal(sigma: float, *size: int) -> Tensor:
        return torch.from_numpy(stream.lognormal(sigma, size))

    if name in ("cls_token", "pos_embed", "reg_token"):
        return 0.1 * normal(*shape)
    if name.endswith("bias"):
        return 0.1 * normal(*shape)
    if len(shape) == 1:  # the gain of a layer norm, or a layer scale
        gain = lognormal(GAINS, *shape)
        gain[normal(*shape).topk(len(gain) // OUTLIER_EVERY).indices] *= OUTLIER_GAIN
        return gain
    rows = lognormal(ROWS, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    tails = lognormal(TAIL, *shape)
    variance = math.exp(2 * TAIL**2 + 2 * ROWS**2)
    return normal(*shape).mul_(tails).mul_(rows).mul_((math.prod(shape[1:]) * variance) ** -0.5)
