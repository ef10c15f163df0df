"""The plan of a model: which backend runs each of its ops, chosen once from the calls of its forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NoReturn

from .backends import BackendError, Spec, choose, reasons, records
from .ops import ALL, bind
from .ops.movement import of


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
            self._choice[op] = choose(requested, wanted, ALL[op].limits, purpose).name

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
        """The bound ops: `plan.ops.layer_norm(x, weight, bias, eps)` and so on, and the `movement` between them.

        Ops that were not planned are there too, and raise BackendError when they are called.
        """
        strict = self.requested != "auto"
        bound = {op: bind(op, self._choice[op], strict) if op in self._choice else Unplanned(op, self) for op in ALL}
        follows = self._choice.get("linear", "auto") if self.requested == "auto" else self.requested
        return SimpleNamespace(**bound, movement=of(follows))

    def explain(self) -> str:
        """A table: op, the backend that runs it, and why each backend preferred to it was refused."""
        lines = [f"{'op':<11} {'backend':<10} refused before it"]
        for op, chosen in self._choice.items():
            specs = [spec for spec in self.specs if spec.op == op]
            lines.append(f"{op:<11} {chosen:<10} " + (_refused_before(self.requested, chosen, specs) or "-"))
        return "\n".join(lines)


class Unplanned:
    """Stands where a plan has no op, so that a call of it is an error and never runs on a backend nobody chose."""

    def __init__(self, op: str, plan: Plan) -> None:
        self.op, self.planned, self.purpose = op, tuple(plan), plan.purpose

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise BackendError(
            f"vit: '{self.op}' was called but not planned" + (f" for {self.purpose}" if self.purpose else "") + "\n"
            f"  planned     {', '.join(self.planned) or 'nothing'}\n"
            f"Add it to what the model asks for (specs), or call vit.ops.{self.op}, which chooses at each call."
        )


def make_plan(backend: str, specs: Iterable[Spec], purpose: str = "") -> Plan:
    """Chooses a backend for every op in `specs`; `purpose` (the model's name) appears in error texts.

    Raises BackendError when a named backend cannot run one of them, ValueError for an unknown name.
    """
    return Plan(backend, specs, purpose)


def _refused_before(requested: str, chosen: str, specs: list[Spec]) -> str:
    if requested != "auto":
        return ""
    refused = []
    for name, backend in records().items():
        if name == chosen:
            break
        why = dict.fromkeys(reason for spec in specs for reason in reasons(backend, spec, ALL[spec.op].limits))
        refused.append(f"{name}: {'; '.join(why)}")
    return " | ".join(refused)
