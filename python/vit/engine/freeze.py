"""A model as the engine takes it: sizes, float32 weights under timm's names, texts; or the reasons why not."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import BackendError, get
from ..model.specs import APPROXIMATE
from ..model.vision_transformer import VisionTransformer
from . import native, rounding
from .accepts import modules_of, refusals, tensor_of
from .smooth import LAYERS, natural_image, observe, smooth


@dataclass(frozen=True)
class Frozen:
    """What `vit_engine_build` takes: sizes, weights with the precision each is packed for, texts."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    precisions: dict[str, int]
    texts: dict[str, str]


# Not merely without gradients: a function of PyTorch's autograd locks the parameter that it reads, and a child forked
# at that moment by another thread would wait for the lock for ever.
@torch.inference_mode()
def freeze(
    model: nn.Module,
    dtype: str,
    calibrate: Tensor | None = None,
    exclude: Collection[str] = (),
    weights: str | None = None,
) -> Frozen:
    """The model's sizes and weights; dropout and drop-path do nothing at inference and are left out.

    For int8 the weights are smoothed and rounded so that each layer's output stays where it is: on `calibrate` images,
    or on one of noise. `weights`: how the linear layers of blocks are stored, where it is not dtype. Layers that
    `exclude` names stay bfloat16.

    Raises BackendError with all reasons why the engine cannot run it, ValueError for unknown names.
    """
    check_quantization(dtype, calibrate, exclude, weights)
    if reasons := list(refusals(model)):
        raise BackendError(
            f"vit: the engine cannot run this {type(model).__name__}\n"
            + "\n".join(f"  {reason}" for reason in reasons)
            + "\nUse the model itself, or a vit.VisionTransformer without changed modules: hooks removed, adapters "
            "merged (peft: model.merge_and_unload())."
        )
    assert isinstance(model, VisionTransformer)
    embed, depth = model.patch_embed, len(model.blocks)
    modules = modules_of(model)
    norm: Any = model.norm if isinstance(model.norm, nn.LayerNorm) else model.fc_norm
    tensors = _weights(model, modules)
    layers = check_layers(exclude, depth)
    precision = native.STORED[weights] if weights else native.PRECISIONS[dtype]
    kept = native.PRECISIONS["bfloat16"]
    precisions = {f"{layer}.weight": kept if layer in exclude else precision for layer in layers}
    (height, width), (patch_height, patch_width) = embed.img_size, embed.patch_size
    first: Any = model.blocks[0]
    activations = {approximate: name for name, approximate in APPROXIMATE.items()}
    num_classes = model.head.out_features if isinstance(model.head, nn.Linear) else 0
    config = {
        "precision": native.PRECISIONS[dtype],
        "pool": native.POOLS[model.global_pool],
        "activation": native.ACTIVATIONS[activations[first.mlp.act.approximate]],
        "dynamic_pad": int(embed.dynamic_pad),
        "norm_first": int(norm is model.norm),
        "channels": embed.in_chans,
        "image_height": height,
        "image_width": width,
        "patch_height": patch_height,
        "patch_width": patch_width,
        "prefix_tokens": int(model.cls_token is not None),
        "embed_dim": model.embed_dim,
        "depth": depth,
        "num_heads": first.attn.num_heads,
        "mlp_width": first.mlp.fc1.out_features,
        "num_classes": num_classes,
        "norm_eps": norm.eps,
    }
    texts = {"name": model.name, "preprocess": json.dumps(model.preprocess.to_dict())}
    if weights:
        texts["weights"] = weights
    if model.class_names is not None and len(model.class_names) == num_classes:
        texts["class_names"] = json.dumps(list(model.class_names))
    plain = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    if dtype == "int8":
        images = natural_image(model) if calibrate is None else calibrate
        with torch.autocast(images.device.type, enabled=False), torch.autocast("cpu", enabled=False):
            plain, inputs = smooth(plain, depth, observe(model, images))
            inputs = {layer: found for layer, found in inputs.items() if layer not in exclude}
            pairs = get(native.DEFAULT).info().get("isa") in rounding.PAIRS_SATURATE
            plain = rounding.round_layers(plain, inputs, pairs)
    return Frozen(config, plain, precisions, texts)


def _weights(model: VisionTransformer, modules: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor the engine reads, under timm's names; what stands in several places, under each of them."""
    tensors = {"mean": torch.tensor(model.preprocess.mean), "std": torch.tensor(model.preprocess.std)}
    prefix = int(model.cls_token is not None)
    positions = None if model.pos_embed is None else model.pos_embed[0].float()
    if model.cls_token is not None:
        tensors["prefix"] = model.cls_token[0].float() + (0 if positions is None else positions[:prefix])
    if positions is not None:
        tensors["positions"] = positions[prefix:]
    for path, module in modules.items():
        for name in ("weight", "bias"):
            tensor = tensor_of(module, name)
            if tensor is not None:
                # The engine has one norm at the end, whatever side of the pooling it stands on.
                tensors[f"{path.removeprefix('fc_')}.{name}"] = tensor
            elif name == "bias" and isinstance(module, nn.Linear):
                tensors[f"{path}.{name}"] = torch.zeros(module.out_features)
    tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"].flatten(1)
    return tensors


def check_quantization(
    dtype: str, calibrate: Tensor | None, exclude: Collection[str], weights: str | None = None
) -> None:
    """Refuses arguments that belong to another dtype."""
    if weights is not None and weights not in native.STORED:
        raise ValueError(f"vit.Engine: weights {weights!r} is not one of {', '.join(native.STORED)} or None")
    if weights is not None and dtype != "bfloat16":
        raise ValueError(f"vit.Engine: weights={weights!r} belongs to dtype='bfloat16', not {dtype!r}")
    if dtype != "int8" and (calibrate is not None or (exclude and weights is None)):
        raise ValueError(f"vit.Engine: calibrate and exclude belong to dtype='int8', not {dtype!r}")
    if isinstance(exclude, str):
        raise ValueError(f"vit.Engine: exclude must be a collection of names, got the text {exclude!r}")
    if calibrate is not None and not len(calibrate):
        raise ValueError("vit.Engine: calibrate holds no images")


def quantizable(depth: int) -> list[str]:
    """The layers of a network of that depth that int8 quantizes."""
    return [f"blocks.{i}.{layer}" for i in range(depth) for layer in LAYERS]


def check_layers(names: Collection[str], depth: int) -> list[str]:
    """All that int8 quantizes; ValueError when one of the names is none of them."""
    layers = quantizable(depth)
    if unknown := sorted(set(names) - set(layers)):
        raise ValueError(
            f"vit.Engine: {', '.join(unknown)} cannot be excluded; layers that can stay bfloat16 are blocks.I.<layer> "
            f"with I from 0 to {depth - 1} and <layer> one of {', '.join(LAYERS)}"
        )
    return layers
