"""Weight initialisation schemes, with timm's names and distributions.

    ""          trunc-normal(0.02) linear weights, zero biases; the patch projection keeps PyTorch's default
    "jax"       Xavier-uniform weights, MLP biases N(0, 1e-6), LeCun-normal patch projection, zero head
    "jax_nlhb"  "jax" with the head bias at -log(num_classes)
    "moco"      Xavier-uniform, with q, k and v of a qkv weight treated as three matrices
    "reset"     PyTorch's defaults everywhere
    "xavier_uniform", "xavier_normal"  weights of deviation sqrt(2 / (inputs + outputs)), zero biases
    "he_uniform", "he_normal"          weights of deviation sqrt(2 / inputs), zero biases
    "uniform", "normal"                weights of deviation 0.02, zero biases
    "skip"      nothing: for weights that are about to be loaded
The last six hold of every linear layer and of the patch projection; a uniform one is U(-sqrt(3) std, sqrt(3) std).
In all but "skip": position embedding trunc-normal(0.02), class token and registers N(0, 1e-6), norms 1 and 0,
LayerScale its init_values, the query of attention pooling trunc-normal(C^-1/2), one factor of gated MLPs near 1.

A key is taken from PyTorch's default generator, so torch.manual_seed fixes a model and every call makes another one.
From there on a parameter depends on the key and its name alone: one seed gives the same weights with every version of
PyTorch, on every processor and device, and (rounded) in every dtype.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..support.random import Stream, fresh_key

#: Standard deviation of a weight by its inputs and outputs, for the schemes that are NAME or NAME_uniform, NAME_normal.
_DEVIATIONS = {
    "xavier_": lambda inputs, outputs: math.sqrt(2 / (inputs + outputs)),
    "he_": lambda inputs, outputs: math.sqrt(2 / inputs),
    "": lambda inputs, outputs: 0.02,
}
_PLAIN = tuple(f"{name}{shape}" for name in _DEVIATIONS for shape in ("uniform", "normal"))

SCHEMES = ("", "jax", "jax_nlhb", "moco", "reset", *_PLAIN, "skip")

#: Standard deviation of a standard normal truncated to [-2, 2].
TRUNCATED_STD = 0.87962566103423978


class Draws:
    """Fills parameters with random numbers, each from the stream of its own name."""

    def __init__(self) -> None:
        self._key: int | None = None

    def normal(self, parameter: Tensor, name: str, std: float, bound: float = math.inf) -> None:
        """N(0, std^2), cut off at `bound` standard deviations.

        Where timm cuts N(0, 0.02^2) off, at 2 = 100 standard deviations, nothing is to cut: no number exceeds 6.4.
        """
        if _has_values(parameter):
            drawn = torch.empty(parameter.numel(), dtype=torch.float32, device="cpu")
            self._stream(name).standard_normal(drawn.numel(), bound=bound, out=drawn.numpy())
            parameter.copy_(drawn.mul_(std).view(parameter.shape))

    def uniform(self, parameter: Tensor, name: str, limit: float) -> None:
        """U(-limit, limit)."""
        if _has_values(parameter):
            drawn = self._stream(name).uniform(-limit, limit, parameter.numel(), np.float32)
            parameter.copy_(torch.from_numpy(drawn).view(parameter.shape))

    def _stream(self, name: str) -> Stream:
        if self._key is None:
            self._key = fresh_key()
        return Stream("parameter", self._key, name)


def _has_values(parameter: Tensor) -> bool:
    """Whether there is memory to fill: not on the meta device, not under FakeTensorMode."""
    return not parameter.is_meta and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


@torch.no_grad()
def init_weights(model: Any, scheme: str, num_classes: int) -> None:
    """Initialises all parameters of a VisionTransformer in place."""
    if scheme == "skip":
        return
    draws = Draws()
    for name, std in _TOKENS.items():
        token = getattr(model, name, None)
        if isinstance(token, nn.Parameter):
            draws.normal(token, name, std)
    for name, module in model.named_modules():
        init_module(module, name, scheme, num_classes, draws)
    for name, module in model.named_modules():
        if scheme != "reset" and name.endswith("mlp"):
            _open_gate(module, name, draws)
    if model.options.fix_init:
        for i, block in enumerate(model.blocks):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.div_(math.sqrt(2.0 * (i + 1)))


def init_module(module: Any, name: str, scheme: str, num_classes: int, draws: Draws) -> None:
    """Initialises the parameters of one layer; other modules stay."""
    if name == "patch_embed.proj" and isinstance(module, (nn.Conv2d, nn.Linear)):
        _init_patch_projection(module, name, scheme, draws)
    elif isinstance(module, nn.Linear):
        init_linear(module, name, scheme, num_classes, draws)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.reset_parameters()
    elif isinstance(gamma := getattr(module, "gamma", None), nn.Parameter):
        nn.init.constant_(gamma, module.init_values)
    elif isinstance(latent := getattr(module, "latent", None), nn.Parameter):
        # As timm: that deviation, before the normal distribution is cut off at twice of it.
        draws.normal(latent, f"{name}.latent", latent.shape[-1] ** -0.5, bound=2.0)


#: Standard deviations of the parameters that belong to no layer.
_TOKENS = {"pos_embed": 0.02, "cls_token": 1e-6, "reg_token": 1e-6, "dist_token": 0.02}


def _open_gate(mlp: Any, name: str, draws: Draws) -> None:
    """What timm's gated MLPs begin with: one factor near 1 (bias 1, weight near 0), of the packed form the second."""
    if hasattr(mlp, "fc1_g"):
        layer, rows, name = mlp.fc1_g, slice(None), f"{name}.fc1_g"
    elif mlp.fc2.in_features * 2 == mlp.fc1.out_features:
        layer, rows, name = mlp.fc1, slice(mlp.fc2.in_features, None), f"{name}.fc1"
    else:
        return
    weight = torch.empty_like(layer.weight[rows])
    draws.normal(weight, f"{name}.weight of the gate", 1e-6)
    layer.weight[rows] = weight
    if layer.bias is not None:
        layer.bias[rows] = 1.0


@torch.no_grad()
def init_linear(linear: nn.Linear, name: str, scheme: str, num_classes: int, draws: Draws) -> None:
    """Initialises one linear layer; its name in the model tells the head, the qkv and the MLP layers
    apart."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    fan_out, fan_in = linear.weight.shape
    if scheme == "reset":
        _pytorch_default(linear, name, draws)
        return
    if scheme in _PLAIN:
        _init_plain(linear, name, scheme, draws)
        return
    _zero_bias(linear)
    if scheme == "":
        draws.normal(linear.weight, weight, 0.02)
    elif scheme == "moco":
        fan_out //= 3 if "qkv" in name else 1
        draws.uniform(linear.weight, weight, math.sqrt(6 / (fan_out + fan_in)))
    elif name.startswith("head"):  # of jax
        nn.init.zeros_(linear.weight)
        nn.init.constant_(linear.bias, -math.log(num_classes) if scheme == "jax_nlhb" else 0.0)
    else:
        draws.uniform(linear.weight, weight, math.sqrt(6 / (fan_out + fan_in)))
        if "mlp" in name and linear.bias is not None:
            draws.normal(linear.bias, bias, 1e-6)


def _init_patch_projection(projection: nn.Conv2d | nn.Linear, name: str, scheme: str, draws: Draws) -> None:
    if scheme in _PLAIN:
        _init_plain(projection, name, scheme, draws)
        return
    if not scheme.startswith("jax"):
        _pytorch_default(projection, name, draws)
        return
    fan_in = projection.weight[0].numel()
    draws.normal(projection.weight, f"{name}.weight", math.sqrt(1 / fan_in) / TRUNCATED_STD, bound=2.0)
    _zero_bias(projection)


def _init_plain(module: nn.Conv2d | nn.Linear, name: str, scheme: str, draws: Draws) -> None:
    """A weight of the scheme's deviation, a bias of zeros."""
    rule, _, shape = scheme.rpartition("_")
    std = _DEVIATIONS[f"{rule}_" if rule else ""](module.weight[0].numel(), len(module.weight))
    if shape == "normal":
        draws.normal(module.weight, f"{name}.weight", std)
    else:
        draws.uniform(module.weight, f"{name}.weight", math.sqrt(3) * std)
    _zero_bias(module)


def _pytorch_default(module: nn.Conv2d | nn.Linear, name: str, draws: Draws) -> None:
    """What nn.Linear and nn.Conv2d do themselves: U(-b, b) with b = 1 / sqrt(inputs) for weight and bias."""
    limit = 1 / math.sqrt(module.weight[0].numel())
    draws.uniform(module.weight, f"{name}.weight", limit)
    if module.bias is not None:
        draws.uniform(module.bias, f"{name}.bias", limit)


def _zero_bias(module: nn.Conv2d | nn.Linear) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def take_room(model: nn.Module, device: torch.device) -> None:
    """Moves a model without values from the meta device to `device`.

    Not by to_empty(): empty_like() of a meta tensor imports PyTorch's symbolic shapes, 0.6 s.
    """
    for module in model.modules():
        for name, meta in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(meta.shape, dtype=meta.dtype, device=device)))
