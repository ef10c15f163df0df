"""Smoothing for int8: channels of an input that stand out are moved into the weights behind them, whose rows have their
own scales.

With s_j = sqrt(largest |input| of channel j / size of column j of the weight), input / s and weight * s give the same
product from inputs that differ less in size (SmoothQuant, arXiv:2211.10438, strength 1/2). The division is free at run
time: a norm takes it into weight and bias, attention passes on what the rows of its values are divided by, and a gated
MLP what those of its ungated half are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..support.random import Stream

#: The layers of a block that int8 quantizes and that can be stored in fewer bits.
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

#: The same of a model's own blocks, which may keep queries, keys and values, or gates and values, apart.
OWN_LAYERS = (
    *("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj"),
    *("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"),
)

#: The norms of a block and the layers that read them, in blocks that have them.
READERS = (
    ("norm1", ("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj")),
    ("norm2", ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x")),
    ("attn.norm", ("attn.proj",)),
    ("mlp.norm", ("mlp.fc2",)),
)
#: A layer whose last rows reach another one multiplied by what is the same for all tokens or channels, or by gates.
PASSED_ON = (
    ("attn.qkv", "attn.proj"),
    ("attn.v_proj", "attn.proj"),
    ("mlp.fc1", "mlp.fc2"),
    ("mlp.fc1_x", "mlp.fc2"),
)
#: A layer -> the module that is given what it reads, whatever the model keeps the layer in.
SEEN_AT = {name: name if name in ("attn.proj", "mlp.fc2") else name.partition(".")[0] for name in OWN_LAYERS}


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

    inputs: a layer's name ("blocks.0.attn.qkv", or as in OWN_LAYERS) -> its input on some images.
    """
    smoothed, after = dict(tensors), dict(inputs)

    def present(block: str, *names: str) -> list[str]:
        return [f"{block}.{name}" for name in names if f"{block}.{name}.weight" in tensors]

    for block in (f"blocks.{i}" for i in range(depth)):
        normed = set()
        for norm, names in READERS:
            layers = present(block, *names)
            if not present(block, norm) or not layers:
                continue
            normed.update(layers)
            scale = _balance(smoothed, layers, inputs[layers[0]].largest)
            _divide(smoothed, f"{block}.{norm}", scale)
            after |= {layer: inputs[layer].divided(scale) for layer in layers}
        for pair in PASSED_ON:
            layers = present(block, *pair)
            if len(layers) < 2 or layers[1] in normed:
                continue
            maker, layer = layers
            rest = len(tensors[f"{maker}.weight"]) - tensors[f"{layer}.weight"].shape[1]  # queries and keys; gates
            if rest == 0 and pair[0] == "mlp.fc1":
                continue  # an activation stands between them
            scale = _balance(smoothed, [layer], inputs[layer].largest)
            _divide(smoothed, maker, torch.cat([scale.new_ones(rest), scale]))
            after[layer] = inputs[layer].divided(scale)
    return smoothed, after


def _divide(tensors: dict[str, Tensor], layer: str, divisor: Tensor) -> None:
    """What a layer makes, divided by channel."""
    weight = tensors[f"{layer}.weight"]
    tensors[f"{layer}.weight"] = weight / (divisor if weight.ndim == 1 else divisor[:, None])
    if f"{layer}.bias" in tensors:
        tensors[f"{layer}.bias"] = tensors[f"{layer}.bias"] / divisor


def _balance(smoothed: dict[str, Tensor], layers: Sequence[str], reach: Tensor) -> Tensor:
    """Multiplies the columns of the weights of layers that read the same by a scale [K], which is returned for what
    makes their input.

    The size of a column is its norm of order 4: 4 to 6 % less expected squared error than by its largest element alone
    (ViT-Ti and ViT-S of bench/weights.py).
    """
    matrices = [smoothed[f"{layer}.weight"] for layer in layers]
    size = torch.cat(matrices).square().square().mean(0).sqrt().sqrt()
    # Of the largest one: layer scales leave columns of any size.
    least = [max(1e-5 * t.max().item(), torch.finfo(t.dtype).tiny) for t in (reach, size)]
    scale = (reach.clamp(min=least[0]) / size.clamp(min=least[1])).sqrt()
    scale /= scale.log().mean().exp()  # a common factor would only move the numbers' size
    smoothed.update((f"{layer}.weight", matrix * scale) for layer, matrix in zip(layers, matrices, strict=True))
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
def observe(
    model: torch.nn.Module, images: Tensor, layers: Sequence[str] | None = None, batch: int = 16
) -> dict[str, Inputs]:
    """The inputs of linear layers of the blocks over `images`, as the model takes them.

    layers: their names ("blocks.0.attn.q_proj"); without, LAYERS of every block, whatever the model keeps them in.
    """
    blocks: Any = model.blocks
    names = [f"blocks.{i}.{layer}" for i in range(len(blocks)) for layer in LAYERS] if layers is None else layers
    share = CLASS_SHARE if getattr(model, "global_pool", "") == "token" else None
    seen = {name: _Seen(len(images), share) for name in names}
    handles = []
    for name in names:
        _, i, layer = name.split(".", 2)  # by place: a block that stands twice has one name among the modules
        handles.append(
            blocks[int(i)]
            .get_submodule(SEEN_AT[layer])
            .register_forward_pre_hook(lambda _module, given, name=name: seen[name].add(given[0]))
        )
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
        self.weights = x.new_full((tokens,), 1 / tokens)
        if self.share is not None and tokens > 1:
            self.weights = x.new_full((tokens,), (1 - self.share) / (tokens - 1))
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
        first = torch.cat([torch.arange(len(rows), device="cpu") == 0 for rows in self.kept])
        share = torch.where(first, self.weights[0], 1 - self.weights[0]).double()
        weights = (share / torch.where(first, first.sum(), (~first).sum()).clamp(min=1)).sqrt().float()
        mean = (sum(self.total[1:], self.total[0]) / self.count).float()
        largest = torch.stack(self.largest).amax(0)
        return Inputs(largest, mean, torch.cat(self.kept) * weights[:, None], weights)
