"""A model as the engine takes it: sizes, float32 weights under timm's names, texts; or the reasons why not."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import BackendError, get
from ..model.deit import VisionTransformerDistilled
from ..model.mlp import GluMlp, Mlp
from ..model.parts import activation_of
from . import native, rounding
from .accepts import modules_of, refusals
from .known import NORMS, mlp_width
from .smooth import LAYERS, natural_image, observe, smooth
from .tensors import tensors_of


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
    config = _config(model, dtype)
    depth, num_classes = config["depth"], config["num_classes"]
    layers = check_layers(exclude, depth)
    if dtype == "int8":
        exclude = {*exclude, *_kept(model)}
    precision = native.STORED[weights] if weights else native.PRECISIONS[dtype]
    kept = native.PRECISIONS["bfloat16"]
    precisions = {f"{layer}.weight": kept if layer in exclude else precision for layer in layers}
    plain = tensors_of(model, modules_of(model))
    if dtype == "int8":
        images = natural_image(model) if calibrate is None else calibrate
        with torch.autocast(images.device.type, enabled=False), torch.autocast("cpu", enabled=False):
            plain, inputs = smooth(plain, depth, observe(model, images))
            inputs = {layer: found for layer, found in inputs.items() if layer not in exclude}
            pairs = get(native.DEFAULT).info().get("isa") in rounding.PAIRS_SATURATE
            plain = rounding.round_layers(plain, inputs, pairs)
    return Frozen(config, plain, precisions, _texts(model, num_classes, weights))


def _kept(model: Any) -> list[str]:
    """The layers that int8 leaves in bfloat16: those of a packed gated MLP without a norm (DINOv2-g), whose values are
    products of two quantized halves, unless the mean over tokens takes their errors out (EVA-02). The smallest cosine
    of DINOv2-g's logits (6 blocks of width 384, two seeds, levels v3 and avx512vnni) is 0.9936 with them and 0.9981
    without; pooled by the mean 0.9985 with them."""
    if model.global_pool == "avg":
        return []
    mlps = [(i, block.mlp) for i, block in enumerate(model.blocks)]
    gated = [i for i, mlp in mlps if isinstance(mlp, GluMlp) and isinstance(mlp.norm, nn.Identity)]
    return [f"blocks.{i}.mlp.{layer}" for i in gated for layer in ("fc1", "fc2")]


def _config(model: Any, dtype: str) -> dict[str, Any]:
    """The fields of vit_engine_config."""
    embed, first, pool = model.patch_embed, model.blocks[0], model.attn_pool
    attn, mlp = first.attn, first.mlp
    norms = [module for module in (model.norm, model.fc_norm) if isinstance(module, NORMS)]
    last = "absent" if not norms else "first" if norms[0] is model.norm else "after pool"
    turns = getattr(model, "rope", None) is not None
    (height, width), (patch_height, patch_width) = embed.img_size, embed.patch_size
    distilled = isinstance(model, VisionTransformerDistilled)
    return {
        "precision": native.PRECISIONS[dtype],
        "pool": native.POOLS["distilled" if distilled else model.global_pool],
        "activation": native.ACTIVATIONS[activation_of(mlp.act) or ""],
        "dynamic_pad": int(embed.dynamic_img_pad),
        "drop_edge": int(getattr(embed, "drop_edge", False) and not embed.dynamic_img_pad),
        "norm_first": native.LAST_NORMS[last],
        "norm": native.NORMS["rmsnorm" if isinstance(first.norm1, nn.RMSNorm) else "layernorm"],
        "embed_norm": int(isinstance(embed.norm, NORMS)),
        "pre_norm": int(isinstance(model.norm_pre, NORMS)),
        "qk_norm": int(isinstance(attn.q_norm, NORMS)),
        "attn_norm": int(isinstance(attn.norm, NORMS)),
        "mlp_norm": int(isinstance(mlp.norm, NORMS)),
        "gated": int(not isinstance(mlp, Mlp)),
        "rotary": native.ROTARIES["none" if not turns else "half" if attn.rotate_half else "interleaved"],
        "rotary_of_heads": int(turns and model.rope_mixed),
        "pool_prefix": int(model.pool_include_prefix or (pool is not None and model.pools_prefix)),
        "pool_activation": 0 if pool is None else native.ACTIVATIONS[activation_of(pool.mlp.act) or ""],
        "channels": embed.in_chans,
        "image_height": height,
        "image_width": width,
        "patch_height": patch_height,
        "patch_width": patch_width,
        "prefix_tokens": model.num_prefix_tokens,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": attn.num_heads,
        "mlp_width": mlp_width(mlp),
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "pool_heads": 0 if pool is None else pool.num_heads,
        "pool_mlp_width": 0 if pool is None else mlp_width(pool.mlp),
        "norm_eps": first.norm1.eps,
    }


def _texts(model: Any, num_classes: int, weights: str | None) -> dict[str, str]:
    texts = {"name": model.name, "preprocess": json.dumps(model.preprocess.to_dict())}
    if weights:
        texts["weights"] = weights
    if model.class_names is not None and len(model.class_names) == num_classes:
        texts["class_names"] = json.dumps(list(model.class_names))
    return texts


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
