"""Weight initialisation schemes, with timm's names and, for the same seed, timm's values.

    ""          trunc-normal(0.02) linear weights, zero biases; the patch projection keeps PyTorch's default
    "jax"       Xavier-uniform weights, MLP biases N(0, 1e-6), LeCun-normal patch projection, zero head
    "jax_nlhb"  "jax" with the head bias at -log(num_classes)
    "moco"      Xavier-uniform, with q, k and v of a qkv weight treated as three matrices
    "reset"     PyTorch's defaults everywhere
    "skip"      nothing: for weights that are about to be loaded
In all but "skip": position embedding trunc-normal(0.02), class token N(0, 1e-6).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .vision_transformer import VisionTransformer

SCHEMES = ("", "jax", "jax_nlhb", "moco", "reset", "skip")

#: Standard deviation of a standard normal truncated to [-2, 2].
TRUNCATED_STD = 0.87962566103423978


@torch.no_grad()
def trunc_normal(tensor: Tensor, std: float, bound: float = 6.0) -> None:
    """Fills with N(0, std^2) truncated to `bound` standard deviations, by the inverse of the distribution
    function.

    torch's own trunc_normal_ draws other values from the same seed in every other release. Six deviations cut
    off only what is an accident: a float32 uniform number is exactly -1 once in 2^24, whose inverse is
    infinite.
    """
    limit = math.erf(bound / math.sqrt(2))
    drawn = torch.empty_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    drawn.uniform_(-limit, limit).erfinv_().mul_(std * math.sqrt(2)).clamp_(-bound * std, bound * std)
    tensor.copy_(drawn)


@torch.no_grad()
def init_weights(model: VisionTransformer, scheme: str, num_classes: int) -> None:
    """Initialises a freshly built VisionTransformer in place."""
    if scheme == "skip":
        return
    if isinstance(model.pos_embed, nn.Parameter):
        trunc_normal(model.pos_embed, 0.02)
    if model.cls_token is not None:
        nn.init.normal_(model.cls_token, std=1e-6)
    for name, module in _depth_first(model):
        if module is model.patch_embed.proj:
            _init_patch_projection(model.patch_embed.proj, scheme)
        elif isinstance(module, nn.Linear):
            init_linear(module, name, scheme, num_classes)


def _depth_first(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children before parents, in the order in which timm draws its random numbers."""
    for name, child in module.named_children():
        yield from _depth_first(child, f"{prefix}{name}.")
        yield f"{prefix}{name}", child


@torch.no_grad()
def init_linear(linear: nn.Linear, name: str, scheme: str, num_classes: int) -> None:
    """Initialises one linear layer; its name in the model tells the head, the qkv and the MLP layers
    apart."""
    if scheme == "":
        trunc_normal(linear.weight, 0.02)
        _zero_bias(linear)
    elif scheme.startswith("jax"):
        if name.startswith("head"):
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, -math.log(num_classes) if scheme == "jax_nlhb" else 0.0)
            return
        nn.init.xavier_uniform_(linear.weight)
        if "mlp" in name and linear.bias is not None:
            nn.init.normal_(linear.bias, std=1e-6)
        else:
            _zero_bias(linear)
    elif scheme == "moco":
        fan_out, fan_in = linear.weight.shape
        if "qkv" in name:
            fan_out //= 3
        bound = math.sqrt(6 / (fan_out + fan_in))
        nn.init.uniform_(linear.weight, -bound, bound)
        _zero_bias(linear)


def _init_patch_projection(projection: nn.Conv2d | nn.Linear, scheme: str) -> None:
    if scheme.startswith("jax"):
        fan_in = projection.weight[0].numel()
        trunc_normal(projection.weight, math.sqrt(1 / fan_in) / TRUNCATED_STD, bound=2.0)
        _zero_bias(projection)


def _zero_bias(module: nn.Conv2d | nn.Linear) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)
