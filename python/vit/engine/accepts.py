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

from ..model.deit import VisionTransformerDistilled
from ..model.parts import activation_of
from ..model.torch_layers import as_known
from ..weights.checkpoint import all_finite
from .known import MODELS, NORMS, kinds_of, mlp_width, shapes_of

#: Poolings that the engine computes.
POOLS = ("token", "avg", "max", "avgmax", "map", "")
#: Options that the engine computes at any value, or that the modules, tensors and lines below decide about.
COMPUTED = frozenset(
    {"img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_eps"}
    | {"qkv_bias", "qkv_fused", "attn_type", "proj_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "init_values"}
    | {"act_layer", "mlp_layer", "swiglu_mlp", "swiglu_align_to", "norm_layer", "embed_norm_layer", "embed_norm_eps"}
    | {"pre_norm", "final_norm"}
    | {"class_token", "reg_tokens", "no_embed_class", "global_pool", "fc_norm", "pool_include_prefix", "patch_embed"}
    | {"use_post_transformer_norm", "attn_pool_num_heads", "attn_pool_mlp_ratio", "head_init_scale"}
    | {"pos_embed", "pos_resize", "pos_embed_grid_size", "pos_embed_ar_preserving"}
    | {"pos_embed_interp_mode", "pos_embed_antialias", "pos_embed_align_corners"}
    | {"dynamic_img_size", "dynamic_img_pad", "drop_edge", "weight_init", "fix_init", "max_num_patches"}
    | {"use_rot_pos_emb", "rope_type", "rope_temperature", "rope_grid_indexing", "rope_grid_offset", "rope_rotate_half"}
    | {"ref_feat_shape", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"}
    | {"drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"}
)


def refusals(model: nn.Module) -> Iterator[str]:
    """Why the engine cannot run a model; nothing when it can."""
    if type_before_parametrizations(model) not in MODELS:
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
        if name not in COMPUTED and value != option.default:
            yield f"{name}={value!r}: the engine computes {option.default!r}"
    most = getattr(model.options, "max_num_patches", None)
    if most is not None and (own := getattr(model.patch_embed, "num_patches", 0)) > most:
        yield f"max_num_patches={most}: images of its own size have {own} patches; model.set_input_size chooses another"
    if model.global_pool not in POOLS:
        computed = ", ".join(map(repr, POOLS))
        yield f"global_pool {model.global_pool!r} does not go with this model: the engine computes {computed}"


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
    expected = kinds_of(modules[""], modules)
    wrong: list[str] = []
    for path in [*expected, *(path for path in modules if path not in expected)]:
        if any(path.startswith(f"{above}.") for above in wrong):
            continue  # said once
        module, kinds = modules.get(path), expected.get(path, ())
        kind = type(None) if module is None else type_before_parametrizations(module)
        if kind in kinds:
            continue
        wrong.append(path)
        wanted = " or ".join(allowed.__name__ for allowed in kinds if allowed is not type(None))
        what = "is missing" if module is None else f"is a {_name(kind)}"
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
    model = modules[""]
    yield from _wrong_ends(model, modules)
    if not len(modules["blocks"]):
        yield "the model has no blocks"
        return
    blocks = [modules[f"blocks.{i}"] for i in modules["blocks"]._modules]
    yield from _unlike(modules, blocks)
    for i, block in enumerate(blocks):
        if not block.attn.fused_attn and block.attn.scale != block.attn.head_dim**-0.5:
            yield f"blocks.{i}.attn.scale is {block.attn.scale:g}, the engine knows 1 / sqrt({block.attn.head_dim})"
    shapes = shapes_of(modules)
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


def _wrong_ends(model: Any, modules: dict[str, Any]) -> Iterator[str]:
    """What does not go together before and behind the blocks."""
    distilled = isinstance(model, VisionTransformerDistilled)
    if sum(isinstance(modules[path], NORMS) for path in ("norm", "fc_norm")) == 2:
        yield "norm and fc_norm are both norms; the engine computes one"
    if distilled and isinstance(modules["fc_norm"], NORMS):
        yield "fc_norm is a norm; a distilled head reads two tokens and no pooled one"
    fits = model.cls_token is not None if model.global_pool == "token" else model.global_pool in POOLS
    if not fits or (model.global_pool == "map") != (model.attn_pool is not None):
        yield f"global_pool {model.global_pool!r} does not go with this model"
    if distilled and type(modules["head"]) is not type(modules["head_dist"]):
        yield "head and head_dist must be layers of the same kind"
    embed = model.patch_embed
    if isinstance(embed.proj, nn.Conv2d) and not embed.cuts_patches(embed.proj):
        yield "patch_embed.proj is not a convolution whose stride is its kernel's size, the patch"


def _unlike(modules: dict[str, Any], blocks: list[Any]) -> Iterator[str]:
    """Settings that the network has once and the layers differ in."""
    norms = [module for module in modules.values() if isinstance(module, NORMS)]
    heads = {module for block in blocks for module in (block.attn.q_norm, block.attn.k_norm)}
    alike: dict[str, set[Any]] = {
        "norm": {type_before_parametrizations(norm).__name__ for norm in norms},
        "norm eps": {norm.eps for norm in norms},
        "num_heads": {block.attn.num_heads for block in blocks},
        "mlp": {type_before_parametrizations(block.mlp).__name__ for block in blocks},
        "mlp width": {mlp_width(block.mlp) for block in blocks},
        "activation": {activation_of(block.mlp.act) for block in blocks},
        "a norm of queries and keys": {isinstance(module, NORMS) for module in heads},
        "attn.norm": {isinstance(block.attn.norm, NORMS) for block in blocks},
        "mlp.norm": {isinstance(block.mlp.norm, NORMS) for block in blocks},
        "rotate_half": {getattr(block.attn, "rotate_half", False) for block in blocks},
        "num_prefix_tokens": {getattr(b.attn, "num_prefix_tokens", modules[""].num_prefix_tokens) for b in blocks},
    }
    for what, values in alike.items():
        if len(values) > 1:
            yield f"{what} differs from layer to layer: {', '.join(map(str, sorted(values, key=str)))}"


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
