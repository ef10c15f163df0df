"""Rounding of weights that keeps a layer's output: an element takes over what rounding the elements before it has moved
(GPTQ, arXiv:2210.17323).

Columns are rounded one after the other. With inputs Y [tokens, K] and E = weight - rounded, known in the columns before
k, the exact columns from k on would make |E Y^T|^2 + damping |E|^2 smallest with a shift of the weight; what is rounded
is the shifted weight. GPTQ's matrix Y^T Y [K, K] is never made: with at most ROWS tokens everything fits [tokens,
tokens], a hundredth of the work where K is 3072.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from .smooth import Inputs

Rounded = TypeVar("Rounded")

#: Columns that are shifted for those before them by one matrix product.
BLOCK = 64

#: Share of the mean square of a channel that is added to all: what other images show besides.
DAMPING = 0.03

#: Levels whose instructions add two products in 16 bits, which saturate: csrc/cpu/engine/int8.h, kPairs.
PAIRS_SATURATE = ("v3", "v4")


def nearest_integer(x: Tensor) -> Tensor:
    """Of int8."""
    return x.round().clamp_(-127, 127)


def round_layers(tensors: Mapping[str, Tensor], inputs: Mapping[str, Inputs], pairs: bool) -> dict[str, Tensor]:
    """The tensors with the weights of the layers that `inputs` names rounded to whole multiples of "<layer>.scale" [N],
    and what that takes from the mean output added to the bias.

    pairs: two neighbours in a row are at most 127 steps together, as PAIRS_SATURATE need it.
    """
    rounded = dict(tensors)

    def round_layer(layer: str) -> dict[str, Tensor]:
        weight, found = tensors[f"{layer}.weight"], inputs[layer]
        scale = _steps(weight, pairs)
        codes = codes_of(weight / scale[:, None], found, nearest_integer, pairs)
        near = codes * scale[:, None]
        bias = tensors[f"{layer}.bias"] + (weight - near) @ found.mean
        return {f"{layer}.weight": near, f"{layer}.scale": scale, f"{layer}.bias": bias}

    for found in each(round_layer, (layer for layer in inputs if tensors[f"{layer}.weight"].shape[1] % 2 == 0)):
        rounded |= found  # the engine refuses others
    return rounded


def each(round_layer: Callable[[str], Rounded], layers: Iterable[str]) -> list[Rounded]:
    """What rounding makes of each layer."""
    # A layer to a thread: threads that share its small operations wait for each other (ViT-S beside two programs on
    # the two cores of a Zen 5: 21.7 s, and 1.9 s so). The number that PyTorch gives to new threads is put back.
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(round_layer, layers))
    finally:
        torch.set_num_threads(threads)


def _steps(weight: Tensor, pairs: bool) -> Tensor:
    """The step of each row: 127 are its largest |element|, or with `pairs` |sum of two neighbours| if that is more."""
    largest = weight.abs().amax(1)
    if pairs:
        largest = torch.maximum(largest, (weight[:, ::2] + weight[:, 1::2]).abs().amax(1))
    return torch.where(largest > 0, largest / 127, largest.new_ones(()))


def codes_of(weight: Tensor, inputs: Inputs, nearest: Callable[[Tensor], Tensor], pairs: bool = False) -> Tensor:
    """Numbers [N, K] that can be stored, near a weight in steps, for which inputs @ (weight - codes).T varies little.

    nearest: what is stored for the elements of a column; pairs: as of `round_layers`."""
    columns = weight.shape[1]
    rows = inputs.rows - inputs.mean * inputs.weights[:, None]
    weight, rows = (torch.nn.functional.pad(t, (0, columns % 2)) for t in (weight, rows))
    power = rows.double().square().sum(0)
    # Strong channels first, as those behind them make up for their error; neighbours stay together.
    order = (power[::2] + power[1::2]).argsort(descending=True)
    order = torch.stack([2 * order, 2 * order + 1], 1).flatten()
    y = (rows.double() / (DAMPING * power.mean()).clamp(min=1e-20).sqrt())[:, order]  # now the damping is 1
    weight = weight[:, order]
    starts = range(0, weight.shape[1], BLOCK)
    behind = torch.eye(len(y), dtype=y.dtype, device=y.device)  # 1 + sum of y y^T of the columns behind a block
    solved = {}
    for i in reversed(starts):
        block = y[:, i : i + BLOCK]
        solved[i] = torch.cholesky_solve(block, torch.linalg.cholesky(behind))
        behind = behind + block @ block.T
    moved = weight.new_zeros(len(weight), len(y))  # (weight - codes) y^T of the columns before a block
    codes = torch.empty_like(weight)
    for i in starts:
        block, exact = y[:, i : i + BLOCK], weight[:, i : i + BLOCK]
        inverse = torch.linalg.inv(torch.eye(block.shape[1], dtype=y.dtype, device=y.device) + block.T @ solved[i])
        factor = torch.linalg.cholesky(inverse).T
        shifted = exact + moved @ (solved[i] @ inverse).float()
        found = _block(shifted.T.contiguous(), (factor / factor.diagonal()[:, None]).float(), nearest, pairs).T
        codes[:, i : i + BLOCK] = found
        moved += (exact - found) @ block.T.float()
    return codes[:, order.argsort()[:columns]]


def _block(columns: Tensor, shares: Tensor, nearest: Callable[[Tensor], Tensor], pairs: bool) -> Tensor:
    """The columns [k, N] rounded; column i shifts those behind it by shares[i] [k] times its error."""
    codes = torch.empty_like(columns)
    for i, column in enumerate(columns):
        code = nearest(column)
        if pairs and i % 2:
            code = torch.minimum(torch.maximum(code, -127 - codes[i - 1]), 127 - codes[i - 1])
        codes[i] = code
        columns[i + 1 :].addr_(shares[i, i + 1 :], column - code, alpha=-1)
    return codes
