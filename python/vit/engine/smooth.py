"""Smoothing for int8: channels of an input that stand out are moved into the weights behind them, whose rows have their
own scales.

With s_j = sqrt(largest |input| of channel j / size of column j of the weight), input / s and weight * s give the same
product from inputs that differ less in size (SmoothQuant, arXiv:2211.10438, strength 1/2). The division is free at run
time: a layer norm takes it into weight and bias, and attention passes on what the rows of its values are divided by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: The layers of a block that int8 quantizes and that can be stored in fewer bits.
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

#: The layer norm of each block and the layer that reads it.
PAIRS = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))

#: Without calibration images a value is taken to reach so many standard deviations.
DEVIATIONS = 4.0


@dataclass(frozen=True)
class Inputs:
    """What calibration images show of a layer's input [.., K]: largest size and mean of each channel, [K] float32."""

    largest: Tensor
    mean: Tensor


def smooth(tensors: dict[str, Tensor], depth: int, inputs: Mapping[str, Inputs] | None = None) -> dict[str, Tensor]:
    """The tensors with smoothed weights in every block, and with `inputs` also the mean input of each layer as
    "blocks.0.mlp.fc2.mean": the engine moves the bias by what rounding the weight takes from the mean output.

    inputs: a layer's name ("blocks.0.attn.qkv") -> its input on calibration images; without it, what the weights in
    front of it let expect of normalised values.
    """
    smoothed = dict(tensors)
    means = {layer: found.mean for layer, found in (inputs or {}).items()}
    for i in range(depth):
        for norm, layer in PAIRS:
            norm, layer = f"blocks.{i}.{norm}", f"blocks.{i}.{layer}"
            weight, bias = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
            reach = inputs[layer].largest if inputs else DEVIATIONS * weight.abs() + bias.abs()
            scale = _balance(smoothed, layer, reach)
            smoothed |= {f"{norm}.weight": weight / scale, f"{norm}.bias": bias / scale}
            if inputs:
                means[layer] = means[layer] / scale
        qkv, proj = f"blocks.{i}.attn.qkv", f"blocks.{i}.attn.proj"
        reach = inputs[proj].largest if inputs else _reach_of_values(tensors, i)
        scale = _balance(smoothed, proj, reach)
        divisor = torch.cat([torch.ones(2 * len(scale)), scale])  # of queries, keys and values
        smoothed[f"{qkv}.weight"] = smoothed[f"{qkv}.weight"] / divisor[:, None]
        if f"{qkv}.bias" in tensors:
            smoothed[f"{qkv}.bias"] = tensors[f"{qkv}.bias"] / divisor
        if inputs:
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


def _reach_of_values(tensors: Mapping[str, Tensor], block: int) -> Tensor:
    """How far a block's values are taken to reach, [C]: what attention makes of them are means."""
    norm, qkv = f"blocks.{block}.norm1", f"blocks.{block}.attn.qkv"
    weight = tensors[f"{qkv}.weight"].chunk(3)[2]
    centre = weight @ tensors[f"{norm}.bias"]
    if f"{qkv}.bias" in tensors:
        centre = centre + tensors[f"{qkv}.bias"].chunk(3)[2]
    return DEVIATIONS * (weight * tensors[f"{norm}.weight"]).square().sum(1).sqrt() + centre.abs()


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

    handles = [
        module.register_forward_pre_hook(lambda _module, given, name=name: keep(name, given[0]))
        for name, module in model.named_modules()
        if name.startswith("blocks.") and name.endswith(LAYERS)
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
