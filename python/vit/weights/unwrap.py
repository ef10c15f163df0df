"""From what a training program saved to the parameters of one model: containers, prefixes of names, their layout."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..support.text import printable
from .checkpoint import WeightsError, some
from .layout import Layout
from .layouts import every

log = logging.getLogger("vit")

#: Names under which training programs keep a state dict, the one to take first: averages (EMA, a DINO teacher) are what
#: their authors evaluate.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher", "shadow_params"),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "encoder", "backbone"),
    *("weights", "params", "target_encoder", "student"),
)
#: Wrappers that stand inside a name where one part of a model was wrapped; no module of a ViT is called so.
INNER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_checkpoint_module)\.")
DEEPEST = 4

_WAY_OUT = "Give a state dict of tensors; one of NumPy arrays as numpy.savez('x.npz', **arrays) writes it"


def unwrap(found: Mapping[Any, Any], source: str) -> tuple[dict[str, Any], dict[str, str], Layout | None]:
    """The entries of one model under names without prefixes, those left out -> why, and the layout of the names.

    A container is looked for by the patch projection that every ViT has; what stands beside that under the same prefix
    belongs to the model, and the rest keeps its name, to be reported. The layout is None where nothing tells it.

    Raises WeightsError when nothing is a tensor, or when two models or two layouts could be meant.
    """
    state = _tensors(_container(found, source), source)
    if not state:
        keys = printable(some([str(key) for key in found])) or "none"
        raise WeightsError(f"vit: {source} holds no tensors that are parameters; its entries: {keys}. {_WAY_OUT}")
    return _without_prefix(_without_inner(state, source), source)


def _tensors(found: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """The entries with a text for a name and an array or tensor for a value; others that stand among them are named."""
    state = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, (Tensor, np.ndarray))}
    if state and (rest := [str(key) for key in found if key not in state]):
        log.info("%s: no tensors, and left out: %s", source, printable(some(rest)))
    return state


def _container(found: Mapping[Any, Any], source: str, deeper: int = DEEPEST) -> Mapping[Any, Any]:
    """The mapping of `found`, itself or inside it, that holds a model."""
    models = list(_models(found))
    if not models:  # no ViT: the outermost tensors say in which way
        for name in WRAPPERS:
            if deeper and isinstance(found.get(name), Mapping):
                return _container(found[name], source, deeper - 1)
        return found
    if len(models) == 1 or models[0][0] == ():
        return models[0][1]
    # One wrapper's models against another's, from the outside in.
    ranks = [[WRAPPERS.index(name) if name in WRAPPERS else len(WRAPPERS) for name in path] for path, _ in models]
    best = min(ranks)
    chosen = [model for model, rank in zip(models, ranks, strict=True) if rank == best]
    if len(chosen) > 1 or len(WRAPPERS) in best:
        paths = some([printable(".".join(map(str, path))) for path, _ in models])
        raise WeightsError(
            f"vit: {source} holds more than one model: {paths}; load the file and pass the state dict of one"
        )
    taken, others = chosen[0][0], [".".join(map(str, path)) for path, _ in models if path != chosen[0][0]]
    log.warning("%s: of the models in it %s was taken, not %s", source, ".".join(map(str, taken)), some(others))
    return chosen[0][1]


def _models(found: Mapping[Any, Any]) -> Iterator[tuple[tuple[Any, ...], Mapping[Any, Any]]]:
    """The mappings that hold a patch projection: (the keys that lead to it, the mapping), the outer ones first.

    Each is looked at once: a pickle may hold one mapping under thousands of names, or inside itself.
    """
    seen: set[int] = {id(found)}
    level: list[tuple[tuple[Any, ...], Mapping[Any, Any]]] = [((), found)]
    for _ in range(DEEPEST + 1):
        below = []
        for path, mapping in level:
            if any(isinstance(mapping[name], (Tensor, np.ndarray)) for name in _projections(mapping)):
                yield path, mapping
                continue
            for key, value in mapping.items():
                if isinstance(value, Mapping) and id(value) not in seen:
                    seen.add(id(value))
                    below.append(((*path, key), value))
        level = below


def _projections(found: Mapping[Any, Any]) -> dict[str, tuple[Layout, str]]:
    """Every patch projection: its whole name -> its layout and what stands before the name.

    Of two layouts whose names for it end alike (trunk.patch_embed.proj, patch_embed.proj) it is of the longer one's.
    """
    best: dict[str, tuple[int, Layout, str]] = {}
    for layout in every():
        for prefix in dict.fromkeys(layout.prefixes(found)):
            inside = {key.removeprefix(prefix): found[key] for key in found if _starts(key, prefix)}
            if not layout.recognises(inside):
                continue
            mark = next(mark for mark in layout.marks if mark in inside)
            if prefix + mark not in best or best[prefix + mark][0] < len(mark):
                best[prefix + mark] = (len(mark), layout, prefix)
    return {name: (layout, prefix) for name, (_, layout, prefix) in best.items()}


def _starts(key: object, prefix: str) -> bool:
    return isinstance(key, str) and key.startswith(prefix)


def _without_inner(state: dict[str, Any], source: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in state.items():
        name = INNER.sub("", key)
        if name in result:
            raise WeightsError(f"vit: {source} holds {printable(name)} twice, with and without a wrapper's name")
        result[name] = value
    return result


def _without_prefix(state: dict[str, Any], source: str) -> tuple[dict[str, Any], dict[str, str], Layout | None]:
    """Names from behind what programs put before all of them: DistributedDataParallel "module.", Lightning "model.",
    DINO "backbone.", in any order and number."""
    layout, prefix = _layout(state, source)
    if layout is None or prefix is None:  # incomplete or no ViT: what all names begin with is a wrapper's
        for wrapper in ("module.", "model.") * 2:
            if all(key.startswith(wrapper) for key in state):
                state = {key.removeprefix(wrapper): value for key, value in state.items()}
        return state, {}, None
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    outer = prefix[: prefix.rstrip(".").rfind(".") + 1]  # of "module.backbone." "module."
    dropped: dict[str, str] = {}
    for key, value in state.items() if prefix else ():
        if not key.startswith(prefix):
            name = key.removeprefix(outer) if key.startswith(outer) else key.rpartition("module.")[2] or key
            if (why := layout.stands_outside(name)) is not None:
                dropped[key] = why
            elif name in inside:
                raise WeightsError(
                    f"vit: {source} holds {printable(name)} twice, with and without {printable(prefix)!r}"
                )
            else:
                inside[name] = value
    inside, beside = layout.select(inside)
    return inside, dropped | beside, layout


def _layout(state: Mapping[str, Any], source: str) -> tuple[Layout | None, str | None]:
    """The layout of the names, and the prefix that all names of its model have."""
    found = _projections(state)
    if len(found) > 1:
        several = len({layout.name for layout, _ in found.values()}) > 1
        named = [
            f"{printable(prefix)!r}" + (f" ({layout.name}'s names)" if several else "")
            for layout, prefix in found.values()
        ]
        raise WeightsError(
            f"vit: {source} holds more than one model, with names that begin with {' and '.join(named[:4])}; pass the "
            "state dict of one"
        )
    return next(iter(found.values()), (None, None))
