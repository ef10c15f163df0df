"""Whether a live model is what its arguments say: every module of it against one that its own library makes anew."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from ..support.records import shown
from ..weights import WeightsError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = ("torch.nn.", "timm.", "transformers.")


def check_untouched(model: nn.Module, what: str) -> None:
    """Refuses, by name, what another model would not have: hooks, wrappers, other code, parametrizations.

    Raises WeightsError.
    """
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if any(not _own(hook) for hooks in _HOOKS for hook in (getattr(module, hooks, None) or {}).values()):
            _refuse(what, f"{where} has a hook, which the new model would not call; remove it first")
        if "forward" in module.__dict__:
            _refuse(what, f"{where} has a forward of its own, which the new model would not have")
        if hasattr(module, "parametrizations"):
            _refuse(what, f"{where} is parametrized; torch.nn.utils.parametrize.remove_parametrizations first")
        if hasattr(type(module), "_vit_swapped"):
            _refuse(what, f"{where} computes with vit's ops already (vit.patch); undo() that first")
        if getattr(module, "_fast_norm", False):
            _refuse(
                what, f"{where} is timm's fast norm, which rounds as autocast does; timm.layers.set_fast_norm(False)"
            )
        code = getattr(type(module).forward, "__module__", None) or ""
        if not f"{code}.".startswith(_LIBRARIES):
            _refuse(what, f"{where} has code of {code or 'unknown origin'}, which is not known here")


def _own(hook: Any) -> bool:
    """Whether a hook is one of transformers' that collect outputs while a caller asks for them."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.utils.")


def check_same(model: nn.Module, twin: nn.Module, what: str, runtime: Collection[str] = ()) -> None:
    """Refuses, by name, every module that is not as in `twin`, made anew from the arguments that were read.

    runtime: attributes that may be set at any time, and are taken along. Raises WeightsError.
    """
    live, made = dict(model.named_modules()), dict(twin.named_modules())
    for name in [*live, *made]:
        if name not in made:
            _refuse(what, f"it has a module {name} ({type(live[name]).__name__}) that is not known here")
        if name not in live:
            _refuse(what, f"it lacks {name} ({type(made[name]).__name__})")
        if type(live[name]) is not type(made[name]):
            was = f"is a {type(live[name]).__name__}, in place of {type(made[name]).__name__}"
            _refuse(what, f"{name or 'the model'} {was}")
        for key, value, wanted in _differences(live[name], made[name], runtime):
            path = f"{name}.{key}" if name else key
            _refuse(what, f"{path} is {shown(value)}, and {shown(wanted)} in a model of its other sizes")


def _differences(live: nn.Module, made: nn.Module, runtime: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, value in the other) of attributes and parameters that differ."""
    for key, wanted in vars(made).items():
        if key == "training" or key.startswith("_") or key in runtime or not _plain(wanted):
            continue
        value = getattr(live, key, None)
        if value != wanted:
            yield key, value, wanted
    for table in ("_parameters", "_buffers"):
        ours, theirs = getattr(live, table), getattr(made, table)
        for key in {**ours, **theirs}:
            shapes = [_shape(one.get(key)) for one in (ours, theirs)]
            if shapes[0] != shapes[1]:
                yield key, *shapes


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _shape(value: Any) -> Any:
    return list(value.shape) if isinstance(value, Tensor) else value


def one_place(model: nn.Module, what: str) -> Tensor:
    """A parameter that has the dtype and the device of all. Raises WeightsError where they differ."""
    parameters = dict(model.named_parameters())
    if not parameters:
        _refuse(what, "it has no parameters")
    first, like = next(iter(parameters.items()))
    for name, other in parameters.items():
        for kind in ("dtype", "device"):
            if getattr(other, kind) != getattr(like, kind):
                both = f"{first} is {_word(getattr(like, kind))} and {name} {_word(getattr(other, kind))}"
                _refuse(what, f"{both}; bring it to one {kind}: model.to(...)")
    return like


def _word(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _refuse(what: str, why: str) -> Any:
    raise WeightsError(f"vit: {what}: {why}")
