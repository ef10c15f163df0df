"""Smoothing for int8: channels of an input that stand out are moved into the weights behind them, whose rows have their
own scales.

With s_j = sqrt(largest |input| of channel j / size of column j of the weight), input / s and weight * s give the same
product from inputs that differ less in size (SmoothQuant, arXiv:2211.10438, strength 1/2). The division is free at run
time: a layer norm takes it into weight and bias, and attention passes on what the rows of its values are divided by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..support.random import Stream

#: The layers of a block that int8 quantizes and that can be stored in fewer bits.
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

#: The layer norm of each block and the layer that reads it.
PAIRS = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))


#: Share of the class token in means, where pooling takes it: the only token that reaches the logits. From 0.1 to 0.5
#: all give about the same error of int8's logits (ViT-Ti of bench/weights.py).
CLASS_SHARE = 0.3

#: Tokens that are kept of a layer's input, and the images they are from: more did not lower the error.
ROWS, IMAGES = 256, 64


@dataclass(frozen=True)
class Inputs:
    """What images show of a layer's input [.., K], float32: largest size and mean of each channel, [K], and some tokens
    with their weights, [n, K] and [n], such that rows.T @ rows is near the mean of x x^T. Rows are multiplied by their
    weights."""

    largest: Tensor
    mean: Tensor
    rows: Tensor
    weights: Tensor

    def divided(self, scale: Tensor) -> Inputs:
        """The same of the input / scale."""
        return Inputs(self.largest / scale, self.mean / scale, self.rows / scale, self.weights)


def smooth(
    tensors: dict[str, Tensor], depth: int, inputs: Mapping[str, Inputs]
) -> tuple[dict[str, Tensor], dict[str, Inputs]]:
    """The tensors with smoothed weights in every block, and what the layers' inputs are then.

    inputs: a layer's name ("blocks.0.attn.qkv") -> its input on some images.
    """
    smoothed, after = dict(tensors), dict(inputs)
    for i in range(depth):
        for norm, layer in PAIRS:
            norm, layer = f"blocks.{i}.{norm}", f"blocks.{i}.{layer}"
            weight, bias = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
            scale = _balance(smoothed, layer, inputs[layer].largest)
            smoothed |= {f"{norm}.weight": weight / scale, f"{norm}.bias": bias / scale}
            after[layer] = inputs[layer].divided(scale)
        qkv, proj = f"blocks.{i}.attn.qkv", f"blocks.{i}.attn.proj"
        scale = _balance(smoothed, proj, inputs[proj].largest)
        divisor = torch.cat([torch.ones(2 * len(scale)), scale])  # of queries, keys and values
        smoothed[f"{qkv}.weight"] = smoothed[f"{qkv}.weight"] / divisor[:, None]
        if f"{qkv}.bias" in tensors:
            smoothed[f"{qkv}.bias"] = tensors[f"{qkv}.bias"] / divisor
        after[proj] = inputs[proj].divided(scale)
    return smoothed, after


def _balance(smoothed: dict[str, Tensor], layer: str, reach: Tensor) -> Tensor:
    """Multiplies the columns of a layer's weight by a scale [K], which is returned for what makes its input.

    The size of a column is its norm of order 4: 4 to 6 % less expected squared error than by its largest element alone
    (ViT-Ti and ViT-S of bench/weights.py).
    """
    matrix = smoothed[f"{layer}.weight"]
    size = matrix.square().square().mean(0).sqrt().sqrt()
    scale = (reach.clamp(min=1e-5) / size.clamp(min=1e-5)).sqrt()
    scale /= scale.log().mean().exp()  # a common factor would only move the numbers' size
    smoothed[f"{layer}.weight"] = matrix * scale
    return scale


def natural_image(model: torch.nn.Module) -> Tensor:
    """One image of noise with the spectrum of natural images, 1 / frequency, as the model takes it.

    It stands for calibration images where there are none. Much of what a layer meets on average comes from the weights
    in front of it, whatever the image: over 8 seeds of ViT-Ti the largest error of the logits fell by half."""
    embed: Any = model.patch_embed
    (height, width), channels, weight = embed.img_size, embed.in_chans, embed.proj.weight
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1 / max(height, width)
    noise = Stream("natural image").standard_normal((1, channels, height, width), np.float64)
    image = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (height, width))
    image /= np.maximum(image.std((2, 3), keepdims=True), 1e-6)
    return torch.from_numpy(image).to(weight.device, weight.dtype)


@torch.no_grad()
def observe(model: torch.nn.Module, images: Tensor, batch: int = 16) -> dict[str, Inputs]:
    """The inputs of every linear layer of the blocks over `images`, as the model takes them."""
    blocks: Any = model.blocks
    share = CLASS_SHARE if getattr(model, "global_pool", "") == "token" else None
    seen = {f"blocks.{i}.{layer}": _Seen(len(images), share) for i in range(len(blocks)) for layer in LAYERS}
    handles = [
        block.get_submodule(layer).register_forward_pre_hook(
            lambda _module, given, name=f"blocks.{i}.{layer}": seen[name].add(given[0])
        )
        for i, block in enumerate(blocks)  # by place: a block that stands twice has one name among the modules
        for layer in LAYERS
    ]
    training = model.training
    model.eval()
    try:
        for part in images.split(batch):
            model(part)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {layer: found.inputs() for layer, found in seen.items()}


class _Seen:
    """Gathers the Inputs of one layer over batches [B, tokens, K] of so many images; share: of token 0 in means."""

    def __init__(self, images: int, share: float | None) -> None:
        self.images, self.share, self.count = images, share, 0
        self.every = -(-images // IMAGES)
        self.largest: list[Tensor] = []
        self.total: list[Tensor] = []
        self.kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        x = x.detach().float().cpu()
        images, tokens = x.shape[:2]
        self.weights = torch.full((tokens,), 1 / tokens)
        if self.share is not None and tokens > 1:
            self.weights = torch.full((tokens,), (1 - self.share) / (tokens - 1))
            self.weights[0] = self.share
        # The first token of each chosen image, and others at equal distances that begin elsewhere in each.
        others = max(ROWS // -(-self.images // self.every) - 1, 1)
        step = max((tokens - 1) / others, 1.0)
        self.largest.append(x.abs().amax((0, 1)))
        self.total.append(torch.einsum("bnk,n->k", x.double(), self.weights.double()))
        for i in range(-self.count % self.every, images, self.every):
            phase = (self.count + i) * 0.618 % 1 * step
            at = [0, *(1 + int(phase + j * step) for j in range(others) if phase + j * step < tokens - 1)]
            self.kept.append(x[i, at])
        self.count += images

    def inputs(self) -> Inputs:
        first = torch.cat([torch.arange(len(rows)) == 0 for rows in self.kept])
        share = torch.where(first, self.weights[0], 1 - self.weights[0]).double()
        weights = (share / torch.where(first, first.sum(), (~first).sum()).clamp(min=1)).sqrt().float()
        mean = (sum(self.total, torch.zeros(())) / self.count).float()
        largest = torch.stack(self.largest).amax(0)
        return Inputs(largest, mean, torch.cat(self.kept) * weights[:, None], weights)
