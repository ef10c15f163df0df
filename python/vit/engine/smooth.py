"""Smoothing for int8: what layer norms amplify is moved into the weights behind them, where each row has its scale.

With s_j = sqrt(largest |input| of channel j / largest |weight| of column j), norm / s and weight * s give the same
product from inputs that differ less in size (SmoothQuant, arXiv:2211.10438, strength 1/2). At run time it is free.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: The norm of each block and the layer that reads it.
PAIRS = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))

#: Without calibration images a normalised value is taken to reach so many standard deviations.
DEVIATIONS = 4.0


def smooth(tensors: dict[str, Tensor], depth: int, largest: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors with smoothed norms and weights in every block.

    largest: norm's name ("blocks.0.norm1") -> largest |output| per channel on calibration images; without it, what the
    norm's own weight and bias let expect.
    """
    smoothed = dict(tensors)
    for block in range(depth):
        for norm, layer in PAIRS:
            norm, layer = f"blocks.{block}.{norm}", f"blocks.{block}.{layer}.weight"
            weight, bias = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
            reach = DEVIATIONS * weight.abs() + bias.abs() if largest is None else largest[norm].cpu().float()
            matrix = tensors[layer]
            scale = (reach.clamp(min=1e-5) / matrix.abs().amax(0).clamp(min=1e-5)).sqrt()
            scale /= scale.log().mean().exp()  # a common factor would only move the numbers' size
            smoothed |= {f"{norm}.weight": weight / scale, f"{norm}.bias": bias / scale, layer: matrix * scale}
    return smoothed


@torch.no_grad()
def largest_outputs(model: torch.nn.Module, images: Tensor, batch: int = 16) -> dict[str, Tensor]:
    """Largest |output| per channel of every block's norms over `images`, as the model takes them."""
    found: dict[str, Tensor] = {}

    def keep(name: str, y: Tensor) -> None:
        largest = y.abs().flatten(0, -2).amax(0)
        found[name] = torch.maximum(found.get(name, largest), largest)

    handles = [
        module.register_forward_hook(lambda _module, _inputs, y, name=name: keep(name, y))
        for name, module in model.named_modules()
        if name.startswith("blocks.") and name.endswith(("norm1", "norm2"))
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
    return found
