"""`vit.quantize`: a model whose blocks multiply numbers of 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .engine.accepts import refusals
from .engine.rounding import codes_of, each
from .engine.smooth import OWN_LAYERS, Inputs, natural_image, observe, smooth
from .model import VisionTransformer
from .model.attention_rope import EvaAttention
from .model.blocks import Block, FusableBlock
from .model.eva_blocks import EvaBlock, EvaBlockPostNorm
from .model.quant_linear import QuantLinear
from .ops.quantized import FORMATS, Format

DTYPES = tuple(FORMATS)
_BLOCKS = (Block, EvaBlock, EvaBlockPostNorm)


@torch.no_grad()
def quantize(
    model: VisionTransformer, dtype: str = "int8", exclude: Collection[str] = (), calibrate: Tensor | None = None
) -> VisionTransformer:
    """A copy of a model for inference, on the same backend, whose block linears multiply numbers of 8 bits.

    blocks.I.attn.qkv, attn.proj, mlp.fc1 and mlp.fc2 become QuantLinear: weights symmetric per output channel, inputs
    per row when they are made (formulas: vit.ops.linear_int8, vit.ops.linear_fp8). Where a model
    has attn.q_proj, k_proj and v_proj, or mlp.fc1_g and fc1_x instead, those do; the q_bias and v_bias of EVA's
    attention become the bias of qkv. All else keeps its dtype.

    dtype      "int8", or "fp8" (e4m3), whose 3 bits of fraction turn logits further: docs/quantization.md says by how
               much, and which layers to exclude
    exclude    names of such layers that stay as they are ("blocks.0.mlp.fc2")
    calibrate  images [B, C, H, W] as the model takes them, for models that vit.Engine can run: weights make up for the
               rounding of others (arXiv:2210.17323), and for int8 channels that stand out behind norms, attention and
               gates are smoothed into the weights (arXiv:2211.10438). Without, weights are the nearest numbers

    Biases take back what rounding takes from the mean output: over those images, or without over one of noise with the
    spectrum of natural images, where vit.Engine can run the model.

    To save and load: torch.save(quantized.state_dict(), path), and load_state_dict on a model quantized with the same
    dtype and `exclude`, whatever its weights and backend.

    Raises TypeError for what is no vit model, ValueError for an unknown dtype, for names that are no such layers, for a
    model that is quantized already or that calibration cannot smooth, BackendError when the model's backend has no
    such product.
    """
    if dtype not in DTYPES:
        raise ValueError(f"vit.quantize: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not isinstance(model, VisionTransformer):
        raise TypeError(
            f"vit.quantize: takes a vit.VisionTransformer, got {type(model).__name__}; vit.create makes one"
        )
    layers = _layers(model, exclude)
    made = copy.deepcopy(model).eval().requires_grad_(False)
    for block in made.blocks:
        if isinstance(attn := block.attn, EvaAttention):
            attn.join_biases()
    inputs = _observe(made, calibrate)
    smoothed: dict[str, Tensor] = {}
    rounded: dict[str, QuantLinear] = {}
    if calibrate is not None:
        if dtype == "int8":
            smoothed, inputs = _smooth(made, inputs)
        rounded = _round(made, layers, inputs, FORMATS[dtype], smoothed)
    intact = [block for block in made.blocks if isinstance(block, FusableBlock) and block.is_as_built()]
    for name in layers:
        parent, _, child = name.rpartition(".")
        linear: Any = made.get_submodule(name)
        if type(linear) is nn.Linear:  # a block that stands twice has been here before
            weight, bias = (smoothed.get(f"{name}.{own}", getattr(linear, own)) for own in ("weight", "bias"))
            mean = inputs[name].mean if inputs else None
            layer = rounded.get(name) or QuantLinear.of(weight, bias, mean, FORMATS[dtype])
            setattr(made.get_submodule(parent), child, layer)
    for block in intact:
        block.keep_classes()
    made.replan(training=False)
    return made


def _layers(model: VisionTransformer, exclude: Collection[str]) -> list[str]:
    """The names of the layers to be quantized."""
    if isinstance(exclude, str):
        raise ValueError(f"vit.quantize: exclude must be a collection of names, got the text {exclude!r}")
    found = []
    for name, layer in _own(model):
        if isinstance(layer, QuantLinear):
            raise ValueError(f"vit.quantize: {name} is quantized already; quantize the original model")
        if type(layer) is nn.Linear:
            found.append(name)
    if unknown := sorted(set(exclude) - set(found)):
        raise ValueError(
            f"vit.quantize: {', '.join(unknown)} cannot be excluded; layers that are quantized are "
            f"{', '.join(found[:4])} and so on to {found[-1]}"
        )
    if not (names := [name for name in found if name not in exclude]):
        raise ValueError("vit.quantize: no layer is left to be quantized: exclude fewer of them")
    return names


def _own(model: VisionTransformer) -> list[tuple[str, nn.Module]]:
    """The modules that stand in the places of the blocks' linear layers, and their names."""
    blocks: Any = model.blocks
    found = []
    for i, block in enumerate(blocks):
        if type(block) not in _BLOCKS:
            kinds = ", ".join(kind.__name__ for kind in _BLOCKS)
            raise ValueError(
                f"vit.quantize: blocks.{i} is a {type(block).__name__}; only vit's blocks can be quantized ({kinds})"
            )
        modules = dict(block.named_modules())
        found += [(f"blocks.{i}.{name}", modules[name]) for name in OWN_LAYERS if name in modules]
    return found


def _observe(model: VisionTransformer, images: Tensor | None) -> dict[str, Inputs]:
    """The inputs of the layers; of a model that cannot be followed none, where no images were given."""
    reasons = list(refusals(model))
    if images is None:
        if reasons:
            return {}
        images = natural_image(model)
    if not len(images):
        raise ValueError("vit.quantize: calibrate holds no images")
    if reasons:
        raise ValueError("vit.quantize: calibrate cannot follow this model: " + "; ".join(reasons))
    return observe(model, images, [name for name, _ in _own(model)])


def _smooth(model: VisionTransformer, inputs: dict[str, Inputs]) -> tuple[dict[str, Tensor], dict[str, Inputs]]:
    """Smooths the weights in place; returns those that changed in float32, and what the inputs are then
    (engine/smooth.py)."""
    own = model.state_dict()
    before = {name: t.float().cpu() for name, t in own.items()}
    smoothed, inputs = smooth(before, len(model.blocks), inputs)
    changed = {name: t.to(model.device) for name, t in smoothed.items() if t is not before[name]}
    for name, tensor in changed.items():
        own[name].copy_(tensor)
    return changed, inputs


def _round(
    model: VisionTransformer, layers: list[str], inputs: dict[str, Inputs], form: Format, smoothed: dict[str, Tensor]
) -> dict[str, QuantLinear]:
    """The layers with weights whose elements make up for the rounding of others (engine/rounding.py). Nothing is
    smoothed for floats: their error follows their own size, whatever else is in a row."""

    def nearest(x: Tensor) -> Tensor:
        return form.nearest(x.clamp(-form.largest, form.largest)).float()

    def round_layer(name: str) -> QuantLinear:
        linear: Any = model.get_submodule(name)
        weight = smoothed.get(f"{name}.weight", linear.weight).float().cpu()
        _, scale = form.quantize_rows(weight)
        codes = codes_of(weight / scale, inputs[name], nearest)
        bias = smoothed.get(f"{name}.bias", linear.bias)
        if bias is not None:
            bias = bias.float() + ((weight - codes * scale) @ inputs[name].mean).to(bias.device)
        device = linear.weight.device
        return QuantLinear(codes.to(form.dtype).to(device), scale.flatten().to(device), bias).eval()

    return dict(zip(layers, each(round_layer, layers), strict=True))
