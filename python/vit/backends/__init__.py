"""Which backends exist, which of them can run what, and the plan a model makes from that.

Every module of this package that does not start with an underscore is one backend and defines BACKEND.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from ._base import CONTRACT, DTYPE_CODES, Backend, BackendError, HostWorkspace, NativeBackend, Spec

__all__ = [
    "CONTRACT",
    "DTYPE_CODES",
    "Backend",
    "BackendError",
    "HostWorkspace",
    "NativeBackend",
    "Plan",
    "Spec",
    "backends",
    "choose",
    "default_device",
    "get",
    "make_plan",
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


def reasons(backend: Backend, spec: Spec) -> list[str]:
    """Why `backend` cannot run `spec`: its own reasons, then the limits every native kernel of the op has."""
    from ..ops import OPS  # the ops stand above the backends; only this question looks up

    shared = OPS[spec.op].limits(spec) if isinstance(backend, NativeBackend) else []
    return backend.reasons(spec) + shared


def choose(name: str, specs: Sequence[Spec], purpose: str = "") -> Backend:
    """The backend that runs every one of `specs` (calls of one op): the named one, or for "auto" the first that can.

    Raises BackendError with every candidate's reasons when there is none.
    """
    candidates = _RECORDS.values() if name == "auto" else [get(name)]
    for backend in candidates:
        why = [reason for spec in specs for reason in reasons(backend, spec)]
        if not why:
            return backend
        if purpose and name == "auto" and not backend.unavailable() and specs[0].device_type in backend.device_types:
            log.info("%s of %s not on %s: %s", specs[0].op, purpose, backend.name, "; ".join(dict.fromkeys(why)))
    failing = next((spec for spec in specs if any(reasons(backend, spec) for backend in candidates)), specs[0])
    raise BackendError(refusal(name, failing, purpose))


def refusal(name: str, spec: Spec, purpose: str = "") -> str:
    """The text of a BackendError: what failed, the inputs, every candidate's reasons, what to do."""
    direction = "forward and backward" if spec.training else "forward"
    lines = [f"vit: backend '{name}' cannot run '{spec.op}' ({direction})" + (f" for {purpose}" if purpose else "")]
    lines.append(f"  inputs      {spec}")
    for other, backend in _RECORDS.items():
        lines.append(f"  {other:<11} {'; '.join(reasons(backend, spec)) or 'ok'}")
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


class Plan(Mapping[str, str]):
    """Which backend runs each op of a model: a read-only mapping op -> backend name, made once and pickled by name."""

    def __init__(self, requested: str, specs: Iterable[Spec], purpose: str = "") -> None:
        self.requested = requested
        self.specs = tuple(specs)
        self.purpose = purpose
        self._choice: dict[str, str] = {}
        by_op: dict[str, list[Spec]] = {}
        for spec in self.specs:
            by_op.setdefault(spec.op, []).append(spec)
        for op, wanted in by_op.items():
            self._choice[op] = choose(requested, wanted, purpose).name

    def __getitem__(self, op: str) -> str:
        return self._choice[op]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choice)

    def __len__(self) -> int:
        return len(self._choice)

    def __repr__(self) -> str:
        used = sorted(set(self._choice.values()))
        if len(used) == 1:
            return used[0]
        return ", ".join(f"{op}: {backend}" for op, backend in self._choice.items())

    @cached_property
    def ops(self) -> SimpleNamespace:
        """The bound ops: `plan.ops.layer_norm(x, weight, bias, eps)` and so on, for all of OPS, and the `movement`."""
        from ..ops import OPS, bind
        from ..ops.movement import of

        bound = {op: bind(op, self._choice.get(op, "auto")) for op in OPS}
        return SimpleNamespace(**bound, movement=of(self._choice.get("linear", "auto")))

    def explain(self) -> str:
        """A table: op, the backend that runs it, and why each backend preferred to it was refused."""
        lines = [f"{'op':<11} {'backend':<10} refused before it"]
        for op, chosen in self._choice.items():
            specs = [spec for spec in self.specs if spec.op == op]
            lines.append(f"{op:<11} {chosen:<10} " + (_refused_before(self.requested, chosen, specs) or "-"))
        return "\n".join(lines)


def make_plan(backend: str, specs: Iterable[Spec], purpose: str = "") -> Plan:
    """Chooses a backend for every op in `specs`; `purpose` (the model's name) appears in error texts.

    Raises BackendError when a named backend cannot run one of them, ValueError for an unknown name.
    """
    return Plan(backend, specs, purpose)


def _refused_before(requested: str, chosen: str, specs: list[Spec]) -> str:
    if requested != "auto":
        return ""
    refused = []
    for name, backend in _RECORDS.items():
        if name == chosen:
            break
        why = dict.fromkeys(reason for spec in specs for reason in reasons(backend, spec))
        refused.append(f"{name}: {'; '.join(why)}")
    return " | ".join(refused)
