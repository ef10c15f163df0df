"""What a layout is: names under which a program keeps the parameters of a ViT, and what becomes of each under timm's.

One file of `layouts` holds one. A file of weights is told from others by the name of its patch
projection, which every ViT has, and by names that only this layout has beside it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..support.records import Record

#: What stands in braces in a name: the number of a block, that of a chunk of them, weight or bias, the first or second
#: of two, any rest.
PARTS = {"n": r"\d+", "c": r"\d+", "w": "weight|bias", "i": "[12]", "x": ".+"}

Change = Callable[..., Any]


@functools.cache
def pattern(name: str) -> re.Pattern[str]:
    """The names that `blocks.{n}.norm{i}.{w}` stands for."""
    text = re.escape(name)
    for part, values in PARTS.items():
        text = text.replace(rf"\{{{part}\}}", f"(?P<{part}>{values})", 1)
    return re.compile(text)


@dataclass(frozen=True)
class Rule:
    """sources -> targets. change: from the tensors of the sources to those of the targets; word: what it does, for the
    report."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    change: Change | None = None
    word: str = "renamed"


def to(source: str | Sequence[str], target: str | Sequence[str], change: Change | None = None) -> Rule:
    """A rule; without a change several sources are stacked along their first axis."""
    sources = (source,) if isinstance(source, str) else tuple(source)
    targets = (target,) if isinstance(target, str) else tuple(target)
    if change is None and len(sources) > 1:
        change = stacked
    word = "renamed" if change is None else change.__name__.strip("_").replace("_", " ")
    return Rule(sources, targets, change, word)


def stacked(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous()


def transposed_with_zero_bias(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor.T.contiguous(), tensor.new_zeros(tensor.shape[1])


def with_zero_bias(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor, tensor.new_zeros(len(tensor))


def as_token(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1, tensor.shape[-1])


def split_query(tensor: Tensor) -> tuple[Tensor, Tensor]:
    third = len(tensor) // 3
    return tensor[:third].contiguous(), tensor[third:].contiguous()


@dataclass(frozen=True)
class Mapped:
    """Parameters of the file, those of the model that they became, and how."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    how: str


@dataclass
class Converted:
    """The tensors under timm's names, the way of each, what is left out -> why, and arguments that the layout implies.
    base: the named model it is, where that is not the layout's usual one."""

    state: dict[str, Tensor] = field(default_factory=dict)
    mapped: list[Mapped] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    implied: dict[str, Any] = field(default_factory=dict)
    base: str | None = None

    def keep(self, key: str, value: Tensor) -> None:
        """A parameter that has timm's name, or one that nobody knows: to be reported as unexpected."""
        self.state[key] = value
        self.mapped.append(Mapped((key,), (key,), "as it is"))

    def drop(self, key: str, why: str) -> None:
        """Takes a parameter out again."""
        del self.state[key]
        for one in self.mapped:
            if key in one.targets:
                self.dropped[" + ".join(one.sources)] = why
        self.mapped = [one for one in self.mapped if key not in one.targets]

    def rename(self, old: str, new: str) -> None:
        """Another name for the parameters whose present one has the form `old`."""

        def named(key: str) -> str:
            match = pattern(old).fullmatch(key)
            return key if match is None else new.format(**match.groupdict())

        self.state = {named(key): value for key, value in self.state.items()}
        self.mapped = [Mapped(one.sources, tuple(map(named, one.targets)), one.how) for one in self.mapped]


@dataclass(frozen=True)
class Layout:
    """How one program names the parameters of a ViT.

    name: for the report. marks: names of the patch projection; ranks: how many dimensions it may have. needs, lacks:
    names of which one must (none may) be there as well. rules: what becomes of each name. dropped: names, as regular
    expressions, that no ViT has -> why; outside: the same of what stands beside a prefix that all names of the ViT
    have. base: the model of timm's that has this layout's options. implied: arguments that every model of this layout
    has. told: a further condition on the names. finish: what needs several tensors at once. model_types, configure: the
    `model_type` of transformers' config.json, and its reader.
    """

    name: str
    marks: tuple[str, ...]
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    rules: tuple[Rule, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None
    implied: Mapping[str, Any] = field(default_factory=dict)
    told: Callable[[Collection[str]], bool] | None = None
    finish: Callable[[Converted], None] | None = None
    model_types: tuple[str, ...] = ()
    configure: Callable[[Record], dict[str, Any]] | None = None

    def prefixes(self, names: Collection[Any]) -> Iterator[str]:
        """What stands before the patch projection in each of the names that end with it."""
        for name in names:
            if isinstance(name, str):
                for mark in self.marks:
                    if name == mark or name.endswith(f".{mark}"):
                        yield name.removesuffix(mark)

    def recognises(self, names: Mapping[str, Any]) -> bool:
        """Whether parameters under names without a prefix are of this layout."""
        mark = next((mark for mark in self.marks if mark in names), None)
        if mark is None or (self.ranks and getattr(names[mark], "ndim", None) not in self.ranks):
            return False
        if any(pattern(lack).fullmatch(name) for lack in self.lacks for name in names):
            return False
        if self.told is not None and not self.told(names):
            return False
        return not self.needs or any(pattern(need).fullmatch(name) for need in self.needs for name in names)

    def select(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The parameters, and what else stands among them -> why it is left out."""
        why = {key: self._why(key, self.dropped) for key in state}
        return {k: v for k, v in state.items() if why[k] is None}, {k: w for k, w in why.items() if w is not None}

    def stands_outside(self, name: str) -> str | None:
        """Why a name beside the prefix is left out; None for one that belongs to the model or is not known."""
        return self._why(name, self.outside)

    def convert(self, state: Mapping[str, Tensor]) -> Converted:
        """The names of the layout -> timm's; what is unknown keeps its name. KeyError: a part of a stack is missing."""
        result = Converted(implied=dict(self.implied))
        for key, value in state.items():
            found = self._rule(key)
            if found is None:
                result.keep(key, value)
                continue
            rule, place, parts = found
            if place:  # taken with the first of its stack
                if rule.sources[0].format(**parts) not in state:
                    raise KeyError(rule.sources[0].format(**parts))
                continue
            sources = tuple(source.format(**parts) for source in rule.sources)
            targets = tuple(target.format(**parts) for target in rule.targets)
            values = value if rule.change is None else rule.change(*(state[source] for source in sources))
            for target, new in zip(targets, (values,) if isinstance(values, Tensor) else values, strict=True):
                if target in result.state:
                    raise KeyError(f"a single {target}")
                result.state[target] = new
            result.mapped.append(Mapped(sources, targets, rule.word if sources != targets else "as it is"))
        if self.finish is not None:
            self.finish(result)
        if (registers := result.state.get("reg_token")) is not None and not registers.numel():
            result.drop("reg_token", "no registers")
        return result

    def _rule(self, key: str) -> tuple[Rule, int, dict[str, str]] | None:
        for rule in self.rules:
            for place, source in enumerate(rule.sources):
                if (match := pattern(source).fullmatch(key)) is not None:
                    return rule, place, match.groupdict()
        return None

    @staticmethod
    def _why(name: str, reasons: Mapping[str, str]) -> str | None:
        return next((why for expression, why in reasons.items() if re.fullmatch(expression, name)), None)
