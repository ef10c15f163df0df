"""A head that answers for parts of patches: a small convolutional decoder, whose arithmetic is the plan's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .options import Options
from .parts import make_activation, make_norm
from .planned import CallsOps
from .torch_layers import call, know


class Upsample(CallsOps, nn.Module):
    """act(norm(convolution)): [B, h, w, C] -> [B, 2 h, 2 w, width].

    A sub-pixel convolution (arXiv:1609.05158): a cell and its eight neighbours, zeros outside, give the four cells into
    which it is divided. That holds every transposed convolution of 4 x 4 with stride 2. As a product of matrices it
    runs on the kernels of any backend, with bits that do not depend on the batch.
    """

    def __init__(self, options: Options, inputs: int, width: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Linear(9 * inputs, 4 * width, **factory)
        self.norm = make_norm(options.norm_layer, width, options.norm_eps, **factory)
        self.act = make_activation(options.act_layer)

    def forward(self, x: Tensor) -> Tensor:
        ops, (height, width) = self.ops, x.shape[1:3]
        x = call(ops, self.conv, neighbours(x).flatten(1, 2))  # [B, h w, 4 width]
        x = x.unflatten(2, (2, 2, -1)).unflatten(1, (height, width))  # [B, h, w, 2, 2, width]
        x = x.transpose(2, 3).flatten(1, 4)  # [B, 4 h w, width]
        return call(ops, self.act, call(ops, self.norm, x)).unflatten(1, (2 * height, 2 * width))


class DecoderHead(CallsOps, nn.Linear):
    """Tokens [B, prefix + h w, C] -> a map of logits [B, classes, 2^k h, 2^k w], by k stages of `options.decoder`
    channels and a linear layer on each cell."""

    def __init__(self, options: Options, grid: tuple[int, int], **factory: Any) -> None:
        widths = (options.embed_dim, *options.decoder)
        super().__init__(widths[-1], options.num_classes, **factory)
        self.grid = grid
        self.stages = nn.Sequential(*(Upsample(options, *pair, **factory) for pair in pairwise(widths)))

    def forward(self, tokens: Tensor) -> Tensor:
        height, width = self.grid
        cells = self.stages(tokens[:, -height * width :].unflatten(1, self.grid))  # [B, 2^k h, 2^k w, C]
        size = cells.shape[1:3]
        return super().forward(cells.flatten(1, 2)).transpose(1, 2).unflatten(2, size)


def neighbours(x: Tensor) -> Tensor:
    """Each cell with the eight around it, row by row, zeros outside: [B, h, w, C] -> [B, h, w, 9 C]."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    return torch.cat([x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], dim=3)


know(Upsample, DecoderHead)
