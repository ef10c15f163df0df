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


@dataclass(frozen=True)
class Inputs:
    """What images show of a layer's input [.., K]: largest size and mean of each channel, [K] float32."""

    largest: Tensor
    mean: Tensor


def smooth(tensors: dict[str, Tensor], depth: int, inputs: Mapping[str, Inputs]) -> dict[str, Tensor]:
    """The tensors with smoothed weights in every block, and the mean input of each layer as "blocks.0.mlp.fc2.mean":
    the engine moves the bias by what rounding the weight takes from the mean output.

    inputs: a layer's name ("blocks.0.attn.qkv") -> its input on some images.
    """
    smoothed = dict(tensors)
    means = {layer: found.mean for layer, found in inputs.items()}
    for i in range(depth):
        for norm, layer in PAIRS:
            norm, layer = f"blocks.{i}.{norm}", f"blocks.{i}.{layer}"
            weight, bias = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
            scale = _balance(smoothed, layer, inputs[layer].largest)
            smoothed |= {f"{norm}.weight": weight / scale, f"{norm}.bias": bias / scale}
            means[layer] = means[layer] / scale
        qkv, proj = f"blocks.{i}.attn.qkv", f"blocks.{i}.attn.proj"
        scale = _balance(smoothed, proj, inputs[proj].largest)
        divisor = torch.cat([torch.ones(2 * len(scale)), scale])  # of queries, keys and values
        smoothed[f"{qkv}.weight"] = smoothed[f"{qkv}.weight"] / divisor[:, None]
        if f"{qkv}.bias" in tensors:
            smoothed[f"{qkv}.bias"] = tensors[f"{qkv}.bias"] / divisor
        means[proj] = means[proj] / scale
    return smoothed | {f"{layer}.mean": mean.contiguous() for layer, mean in means.items()}


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
    largest: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def keep(layer: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2)
        largest[layer] = torch.maximum(largest.get(layer, rows.new_zeros(())), rows.abs().amax(0))
        total[layer] = total.get(layer, 0) + rows.double().sum(0)
        count[layer] = count.get(layer, 0) + len(rows)

    blocks: Any = model.blocks
    handles = [
        block.get_submodule(layer).register_forward_pre_hook(
            lambda _module, given, name=f"blocks.{i}.{layer}": keep(name, given[0])
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
    return {
        layer: Inputs(largest[layer].cpu().float(), (total[layer] / count[layer]).cpu().float()) for layer in largest
    }
