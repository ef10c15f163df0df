"""Which backends exist, and which of them can run what.

Every module of this package that does not start with an underscore is one backend and defines BACKEND.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._base import CONTRACT, Backend, BackendError, HostWorkspace, NativeBackend, Spec, constant, expect

__all__ = [
    "CONTRACT",
    "Backend",
    "BackendError",
    "HostWorkspace",
    "NativeBackend",
    "Spec",
    "backends",
    "choose",
    "constant",
    "default_device",
    "expect",
    "get",
    "reasons",
    "records",
]

log = logging.getLogger("vit")


def _discover() -> dict[str, Backend]:
    names = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    found = [importlib.import_module(f"{__name__}.{name}").BACKEND for name in names]
    return {backend.name: backend for backend in sorted(found, key=lambda b: -b.priority)}


_RECORDS = _discover()


def records() -> dict[str, Backend]:
    """All backends by name, the most preferred first."""
    return dict(_RECORDS)


def backends() -> dict[str, dict[str, Any]]:
    """Name -> record of every backend: available, the reason if not, devices, build and run-time information."""
    return {name: backend.info() for name, backend in _RECORDS.items()}


def get(name: str) -> Backend:
    """The backend of that name; ValueError names the known ones."""
    try:
        return _RECORDS[name]
    except KeyError:
        known = ", ".join(["auto", *_RECORDS])
        raise ValueError(f"vit: unknown backend {name!r}; known are {known}") from None


#: Why no native kernel of an op can run a Spec; empty when they can.
Limits = Callable[[Spec], list[str]]


def reasons(backend: Backend, spec: Spec, limits: Limits) -> list[str]:
    """Why `backend` cannot run `spec`: its own reasons, then the limits every native kernel of the op has."""
    return backend.reasons(spec) + (limits(spec) if isinstance(backend, NativeBackend) else [])


def choose(name: str, specs: Sequence[Spec], limits: Limits, purpose: str = "") -> Backend:
    """The backend that runs every one of `specs` (calls of one op): the named one, or for "auto" the first that can.

    Raises BackendError with every candidate's reasons when there is none.
    """
    candidates = _RECORDS.values() if name == "auto" else [get(name)]
    for backend in candidates:
        why = [reason for spec in specs for reason in reasons(backend, spec, limits)]
        if not why:
            return backend
        if purpose and name == "auto" and not backend.unavailable() and specs[0].device_type in backend.device_types:
            log.info("%s of %s not on %s: %s", specs[0].op, purpose, backend.name, "; ".join(dict.fromkeys(why)))
    failing = next((spec for spec in specs if any(reasons(b, spec, limits) for b in candidates)), specs[0])
    raise BackendError(refusal(name, failing, limits, purpose))


def refusal(name: str, spec: Spec, limits: Limits, purpose: str = "") -> str:
    """The text of a BackendError: what failed, the inputs, every candidate's reasons, what to do."""
    direction = "forward and backward" if spec.training else "forward"
    lines = [f"vit: backend '{name}' cannot run '{spec.op}' ({direction})" + (f" for {purpose}" if purpose else "")]
    lines.append(f"  inputs      {spec}")
    for other, backend in _RECORDS.items():
        lines.append(f"  {other:<11} {'; '.join(reasons(backend, spec, limits)) or 'ok'}")
    lines.append('Use backend="auto" to fall back per op, or backend="reference".')
    return "\n".join(lines)


def default_device(name: str) -> torch.device:
    """The device meant by device=None: the named backend's own; for "auto" the first usable of cuda, xpu, cpu."""
    if name != "auto":
        return get(name).default_device()
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            return torch.device(kind, module.current_device())
    return torch.device("cpu")
