"""Which models the engine computes: exactly these modules with exactly these tensors, and nobody listening.

Everything that is not known is a reason to refuse: a module, parameter or buffer that the engine would pass over would
make its logits wrong without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..model.blocks import Attention, Block, Mlp
from ..model.layers import DropPath, PatchDropout, PatchEmbed
from ..model.torch_layers import as_known
from ..model.vision_transformer import VisionTransformer
from ..weights.checkpoint import all_finite

Shape = tuple[int, ...]
Kinds = tuple[type[nn.Module], ...]

_NORM: Kinds = (nn.LayerNorm,)
_LINEAR: Kinds = (nn.Linear,)
_NOTHING: Kinds = (nn.Identity,)
#: What does nothing in evaluation mode.
_DROP: Kinds = (nn.Dropout, nn.Identity, DropPath, PatchDropout)

#: Poolings that the engine computes.
POOLS = ("token", "avg", "")
#: Options that the engine computes at any value, or that the modules, tensors and lines below decide about.
COMPUTED = frozenset(
    {"img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_eps"}
    | {"qkv_bias", "proj_bias", "class_token", "global_pool", "fc_norm", "pool_include_prefix", "patch_embed"}
    | {"pos_embed", "pos_resize", "dynamic_img_pad", "drop_edge", "weight_init", "fix_init"}
    | {"drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"}
)
#: Options beside them that may differ from their default -> the values that the engine computes.
OPTIONS: dict[str, tuple[Any, ...]] = {"init_values": (None, 0), "act_layer": ("gelu", "gelu_tanh")}

#: path -> the classes it may have, in a model and in each of its blocks.
MODEL: dict[str, Kinds] = {
    "": (VisionTransformer,),
    "patch_embed": (PatchEmbed,),
    "patch_embed.proj": (nn.Conv2d, nn.Linear),
    "patch_embed.norm": _NOTHING,
    "pos_drop": _DROP,
    "patch_drop": _DROP,
    "norm_pre": _NOTHING,
    "blocks": (nn.Sequential,),
    "norm": (nn.LayerNorm, nn.Identity),
    "fc_norm": (nn.LayerNorm, nn.Identity),
    "head_drop": _DROP,
    "head": (nn.Linear, nn.Identity),
}
BLOCK: dict[str, Kinds] = {
    "": (Block,),
    ".norm1": _NORM,
    ".attn": (Attention,),
    ".attn.qkv": _LINEAR,
    ".attn.q_norm": _NOTHING,
    ".attn.k_norm": _NOTHING,
    ".attn.attn_drop": _DROP,
    ".attn.norm": _NOTHING,
    ".attn.proj": _LINEAR,
    ".attn.proj_drop": _DROP,
    ".ls1": _NOTHING,
    ".drop_path1": _DROP,
    ".norm2": _NORM,
    ".mlp": (Mlp,),
    ".mlp.fc1": _LINEAR,
    ".mlp.act": (nn.GELU,),
    ".mlp.drop1": _DROP,
    ".mlp.norm": _NOTHING,
    ".mlp.fc2": _LINEAR,
    ".mlp.drop2": _DROP,
    ".ls2": _NOTHING,
    ".drop_path2": _DROP,
}


def refusals(model: nn.Module) -> Iterator[str]:
    """Why the engine cannot run a model; nothing when it can."""
    if type_before_parametrizations(model) is not VisionTransformer:
        yield f"needs a vit.VisionTransformer, got {type(model).__name__}"
        return
    modules = modules_of(model)
    if reasons := list(_options(model)):  # one line for each, not one for each module it made
        yield from reasons
        return
    for check in (_wrong_modules, _listeners, _wrong_sizes, _wrong_values):
        reasons = list(check(modules))
        yield from reasons
        if reasons:  # what follows stands on it
            return


def _options(model: Any) -> Iterator[str]:
    """Options of the model that the engine does not compute: also one that this file has never heard of."""
    for option in fields(model.options):
        name, value = option.name, getattr(model.options, option.name)
        allowed = OPTIONS.get(name, (option.default,))
        if name not in COMPUTED and value not in allowed:
            yield f"{name}={value!r}: the engine computes {' or '.join(map(repr, allowed))}"
    if model.global_pool not in POOLS:
        computed = ", ".join(map(repr, POOLS))
        yield f"global_pool {model.global_pool!r} does not go with this model: the engine computes {computed}"
    if model.pool_include_prefix and model.num_prefix_tokens and model.global_pool == "avg":
        yield "pool_include_prefix=True: the engine averages the patches alone"
    embed = model.patch_embed
    cuts_edge = isinstance(embed, PatchEmbed) and embed.drop_edge and not embed.dynamic_img_pad
    if cuts_edge and any(side % size for side, size in zip(embed.img_size, embed.patch_size, strict=True)):
        yield f"drop_edge=True: the engine takes images of whole patches, not {list(embed.img_size)}"


def modules_of(model: nn.Module) -> dict[str, Any]:
    """path -> module, those that stand in several places in each; without what parametrizations consist of."""
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if "parametrizations" not in path.split(".")
    }


@torch.no_grad()
def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of a module as its forward uses it in evaluation mode: masked, normalised, parametrized; None if absent.

    Pruning, weight_norm and spectral_norm make it anew in a hook before each forward.
    """
    training = {m: m.training for m in module.modules()}
    try:
        for m in training:
            m.training = False  # a spectral norm goes on with its iteration otherwise
        for hook in _remakers(module):
            hook(module, ())
        return getattr(module, name, None)
    finally:
        for m, mode in training.items():
            m.training = mode


def _remakers(module: nn.Module) -> list[Any]:
    kinds = BasePruningMethod, WeightNorm, SpectralNorm
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kinds)]


def _wrong_modules(modules: dict[str, Any]) -> Iterator[str]:
    expected = dict(MODEL)
    for i in modules["blocks"]._modules if isinstance(modules.get("blocks"), nn.Sequential) else ():
        expected |= {f"blocks.{i}{path}": kinds for path, kinds in BLOCK.items()}
    wrong: list[str] = []
    for path in [*expected, *(path for path in modules if path not in expected)]:
        if any(path.startswith(f"{above}.") for above in wrong):
            continue  # said once
        module, kinds = modules.get(path), expected.get(path, ())
        kind = None if module is None else type_before_parametrizations(module)
        if kind in kinds:
            continue
        wrong.append(path)
        wanted = " or ".join(allowed.__name__ for allowed in kinds)
        what = "is missing" if kind is None else f"is a {_name(kind)}"
        yield f"{path} {what}; the engine knows {wanted or 'no module of that name'}"


def _name(kind: type) -> str:
    """A class of PyTorch or vit by its name alone; adapters like to bear the name of what they stand for."""
    ours = kind.__module__.partition(".")[0] in ("torch", "vit")
    return kind.__name__ if ours else f"{kind.__module__}.{kind.__name__}"


def _listeners(modules: dict[str, Any]) -> Iterator[str]:
    """Whatever else than the modules' own forward happens when they are called; backward hooks change no logits."""
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        yield "a forward hook for all modules is registered (torch.nn.modules.module.register_module_forward_hook)"
    for kind in dict.fromkeys(map(type_before_parametrizations, modules.values())):
        if not as_known((kind,)):
            yield f"the class {kind.__name__} has been given another forward"
    for path, module in modules.items():
        name = path or "the model"
        if module._forward_hooks or len(module._forward_pre_hooks) > len(_remakers(module)):
            yield f"{name} has a forward hook; remove it, or use the model itself"
        # Where an instance has its own, the class's is not called.
        for own in module.__dict__:
            if callable(getattr(type(module), own, None)):
                yield f"{name} has a {own} of its own in place of {type(module).__name__}.{own}"


def _wrong_sizes(modules: dict[str, Any]) -> Iterator[str]:
    """Tensors whose names or shapes are not those of the network, and settings that differ between layers."""
    model, embed = modules[""], modules["patch_embed"]
    norms = [path for path in ("norm", "fc_norm") if isinstance(modules[path], nn.LayerNorm)]
    if len(norms) != 1:
        yield "exactly one of norm and fc_norm must be a LayerNorm"
    if model.global_pool not in POOLS or (model.global_pool == "token" and model.cls_token is None):
        yield f"global_pool {model.global_pool!r} does not go with this model"
    if not len(modules["blocks"]):
        yield "the model has no blocks"
        return
    blocks = [modules[f"blocks.{i}"] for i in modules["blocks"]._modules]
    alike: dict[str, set[Any]] = {
        "norm eps": {module.eps for module in modules.values() if isinstance(module, nn.LayerNorm)},
        "num_heads": {block.attn.num_heads for block in blocks},
        "mlp width": {block.mlp.fc1.out_features for block in blocks},
        "activation": {block.mlp.act.approximate for block in blocks},
    }
    for what, values in alike.items():
        if len(values) > 1:
            yield f"{what} differs from layer to layer: {', '.join(map(str, sorted(values, key=str)))}"
    for i, block in enumerate(blocks):
        if not block.attn.fused_attn and block.attn.scale != block.attn.head_dim**-0.5:
            yield f"blocks.{i}.attn.scale is {block.attn.scale:g}, the engine knows 1 / sqrt({block.attn.head_dim})"
    proj = embed.proj
    if isinstance(proj, nn.Conv2d) and not embed.cuts_patches(proj):
        yield "patch_embed.proj is not a convolution whose stride is its kernel's size, the patch"
    shapes = _shapes(modules, blocks[0])
    for path, module in modules.items():
        expected = shapes.get(path, {})
        if unknown := sorted(_tensors(module) - set(expected)):
            yield f"{path or 'the model'} has {', '.join(unknown)}, of which the engine knows nothing"
        for name, shape in expected.items():
            tensor = tensor_of(module, name)
            full = f"{path}.{name}".removeprefix(".")
            if tensor is None and not (name == "bias" and isinstance(module, (nn.Linear, nn.Conv2d))):
                yield f"{full} is missing"
            elif tensor is not None and tuple(tensor.shape) != shape:
                yield f"{full} is {list(tensor.shape)}, the engine needs {list(shape)}"


def _shapes(modules: dict[str, Any], first: Any) -> dict[str, dict[str, Shape]]:
    """path -> the tensors a module must have; biases of linear layers may be absent."""
    model, embed, head = modules[""], modules["patch_embed"], modules["head"]
    C, hidden, prefix = model.embed_dim, first.mlp.fc1.out_features, int(model.cls_token is not None)

    def layer(inputs: int, outputs: int) -> dict[str, Shape]:
        return {"weight": (outputs, inputs), "bias": (outputs,)}

    norm: dict[str, Shape] = {"weight": (C,), "bias": (C,)}
    shapes = {path: norm for path, module in modules.items() if isinstance(module, nn.LayerNorm)}
    for i in modules["blocks"]._modules:
        shapes[f"blocks.{i}.attn.qkv"] = layer(C, 3 * C)
        shapes[f"blocks.{i}.attn.proj"] = layer(C, C)
        shapes[f"blocks.{i}.mlp.fc1"] = layer(C, hidden)
        shapes[f"blocks.{i}.mlp.fc2"] = layer(hidden, C)
    shapes["patch_embed.proj"] = layer(embed.patch_values, C)
    if isinstance(embed.proj, nn.Conv2d):
        shapes["patch_embed.proj"]["weight"] = (C, embed.in_chans, *embed.patch_size)
    if isinstance(head, nn.Linear):
        shapes["head"] = layer(C, head.out_features)
    shapes[""] = {"cls_token": (1, 1, C)} if prefix else {}
    if model.pos_embed is not None:
        shapes[""]["pos_embed"] = (1, prefix + embed.num_patches, C)
    return shapes


def _tensors(module: nn.Module) -> set[str]:
    """Names of a module's own tensors; one that is made from others counts once, under its name."""
    names = {name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    for hook in _remakers(module):
        name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
        names -= {f"{name}_{part}" for part in ("orig", "mask", "g", "v", "u")}
        names.add(name)
    if is_parametrized(module):
        names |= set(module.parametrizations.keys())  # type: ignore[union-attr, operator]
    return names


def _wrong_values(modules: dict[str, Any]) -> Iterator[str]:
    for path, module in modules.items():
        for name in _tensors(module):
            tensor, full = tensor_of(module, name), f"{path}.{name}".removeprefix(".")
            assert tensor is not None  # _tensors found it
            if tensor.is_meta:
                yield f"{full} has no values (it is on the meta device)"
                return
            if not all_finite(tensor):
                yield f"{full} holds NaN or infinity"
