"""Norms and activations by their names, and what a block's fused path makes of the modules."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import sides
from .layers import PatchEmbed, QuickGELU
from .options import Options
from .torch_layers import layer_norm, rms_norm, untouched

NORM_CLASSES: dict[str, type[nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
NORM_KINDS = (nn.LayerNorm, nn.RMSNorm)
ACTIVATION_KINDS = (nn.GELU, QuickGELU, nn.SiLU, nn.ReLU)


def make_norm(kind: str, dim: int, eps: float, **factory: Any) -> nn.Module:
    """A norm over the last `dim` values, by its name in Options."""
    return NORM_CLASSES[kind](dim, eps, **factory)


def make_embed_norm(o: Options, **factory: Any) -> nn.Module:
    """The norm of projected patches, or an Identity."""
    if o.embed_norm_layer is None:
        return nn.Identity()
    eps = o.norm_eps if o.embed_norm_eps is None else o.embed_norm_eps
    return make_norm(o.embed_norm_layer, o.embed_dim, eps, **factory)


def make_patch_embed(o: Options, **factory: Any) -> PatchEmbed:
    """The patch embedding of these options."""
    return PatchEmbed(
        sides("img_size", o.img_size),
        sides("patch_size", o.patch_size),
        o.in_chans,
        o.embed_dim,
        o.patch_embed,
        o.dynamic_img_pad,
        dynamic_size=o.dynamic_img_size,
        drop_edge=o.drop_edge,
        stride=None if o.patch_stride is None else sides("patch_stride", o.patch_stride),
        bias=not o.pre_norm,  # the norm behind it has one, as in CLIP
        norm=make_embed_norm(o, **factory),
        **factory,
    )


def make_representation(o: Options, **factory: Any) -> nn.Module:
    """tanh(fc(x)) before the head: [B, C] -> [B, representation_size]."""
    layers = {"fc": nn.Linear(o.embed_dim, o.representation_size, **factory), "act": nn.Tanh()}
    return nn.Sequential(OrderedDict(layers))


def make_activation(name: str) -> nn.Module:
    """An activation by its name in Options."""
    if name.startswith("gelu"):
        return nn.GELU(approximate="tanh" if name == "gelu_tanh" else "none")
    return {"quick_gelu": QuickGELU, "silu": nn.SiLU, "relu": nn.ReLU}[name]()


def activation_name(module: nn.Module) -> str | None:
    """The name in Options of what an untouched activation module computes; None for any other module."""
    return activation_of(module) if untouched(module, type(module)) else None


def activation_of(module: nn.Module) -> str | None:
    """The name in Options of an activation, by its class."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    kinds: dict[type[nn.Module], str] = {QuickGELU: "quick_gelu", nn.SiLU: "silu", nn.ReLU: "relu"}
    return kinds.get(type(module))


def norm(ops: Any, module: nn.Module, x: Tensor) -> Tensor:
    """An untouched norm, or an Identity in its place."""
    if type(module) is nn.LayerNorm:
        return layer_norm(ops, module, x)
    return rms_norm(ops, module, x) if type(module) is nn.RMSNorm else x


def activate(ops: Any, name: str, x: Tensor) -> Tensor:
    """The activation of that name."""
    if name.startswith("gelu"):
        return ops.gelu(x, "tanh" if name == "gelu_tanh" else "none")
    if name == "relu":
        return F.relu(x)
    return x * torch.sigmoid(1.702 * x) if name == "quick_gelu" else F.silu(x)


def gated(ops: Any, name: str, gate: Tensor, x: Tensor) -> Tensor:
    """activation(gate) * x: two tensors of one shape."""
    return ops.swiglu(x, gate) if name == "silu" else activate(ops, name, gate) * x


def gated_packed(ops: Any, name: str, packed: Tensor) -> Tensor:
    """activation(first half) * second half: [..., 2 H] -> [..., H]."""
    return ops.swiglu(packed) if name == "silu" else gated(ops, name, *packed.chunk(2, dim=-1))
