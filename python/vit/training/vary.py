"""What a sweep varies: --vary lr=1e-4..1e-2 depth=1,2,4."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.eva_options import EvaOptions
from ..model.options import DEFAULTS, defaults_of
from ..support.records import parse_yaml, shown
from .config import CHOICES, FIELDS, TrainConfig, convert
from .resume import FREE

LOG_RATIO = 10.0  # ends of a range of numbers that are so far apart are searched by their logarithms

#: Options that change no result of a training but its time, or what it is: no search over them.
_FIXED = (set(FREE) - {"epochs"}) | {"arch", "task"}


@dataclass(frozen=True)
class Vary:
    """One option of a training, or argument of its model (`is_arch`), and the values it may take: some `choices`, or
    what lies from `low` to `high`, whole numbers where both are."""

    name: str
    is_arch: bool
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def is_range(self) -> bool:
        return not self.choices

    @property
    def log(self) -> bool:
        """Whether factors count, not differences."""
        return self.low > 0 and self.high / self.low >= LOG_RATIO

    def suggest(self, trial: Any) -> Any:
        """The value of an Optuna trial."""
        if not self.is_range:
            return trial.suggest_categorical(self.name, list(self.choices))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.name, self.low, self.high, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)


def parse(words: Sequence[str]) -> list[Vary]:
    """The options of --vary; ValueError names a word that cannot be, and why."""
    found = [_parse(word) for word in words]
    names = [one.name for one in found]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"vit: --vary has {twice} twice; give all its values in one")
    return found


def _parse(word: str) -> Vary:
    key, equals, text = word.partition("=")
    if not equals or not key or not text:
        raise ValueError(f"vit: --vary takes NAME=LOW..HIGH or NAME=A,B,C; got {shown(word)}")
    name, is_arch = _name(key.removeprefix("--").replace("-", "_"))
    low, dots, high = text.partition("..")
    if dots:
        return _range(word, name, is_arch, low, high)
    values = tuple(_value(name, is_arch, part, word) for part in text.split(","))
    if len(set(map(repr, values))) < len(values):
        raise ValueError(f"vit: --vary {shown(word)} has a value twice")
    return Vary(name, is_arch, choices=values)


def _name(name: str) -> tuple[str, bool]:
    """The option, and whether it is an argument of the model: lr, depth, arch.patch_size."""
    plain = name.removeprefix("arch.")
    arch = set(DEFAULTS) | set(defaults_of(EvaOptions))
    if plain == name and name in FIELDS and name not in _FIXED:
        return name, False
    if plain in arch:
        return plain, True
    if plain in _FIXED:
        raise ValueError(f"vit: --vary {plain}: it makes no other training; give it once, as an option")
    known = [*(set(FIELDS) - _FIXED), *arch]
    near = difflib.get_close_matches(plain, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "it takes options of vit train and arguments of the model"
    raise ValueError(f"vit: --vary has no {shown(name)}; {hint}")


def _range(word: str, name: str, is_arch: bool, low: str, high: str) -> Vary:
    if name in CHOICES:
        raise ValueError(f"vit: --vary {shown(word)}: {name} is one of {', '.join(CHOICES[name])}; give some of them")
    ends = [_number(text, word) for text in (low, high)]
    if not is_arch:
        ends = [_value(name, False, text, word) for text in (low, high)]
        if not all(isinstance(end, (int, float)) for end in ends):
            raise ValueError(f"vit: --vary {shown(word)}: {name} is no number; give values: NAME=A,B,C")
    if not ends[0] < ends[1]:
        raise ValueError(f"vit: --vary {shown(word)}: {low} is not below {high}")
    return Vary(name, is_arch, low=ends[0], high=ends[1])


def _number(text: str, word: str) -> float:
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    raise ValueError(f"vit: --vary {shown(word)}: {shown(text)} is no number")


def _value(name: str, is_arch: bool, text: str, word: str) -> Any:
    """One value, in the option's own kind and range."""
    if not text:
        raise ValueError(f"vit: --vary {shown(word)} has an empty value")
    if is_arch:
        value = parse_yaml(text, f"--vary {name}")
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise ValueError(f"vit: --vary {shown(word)}: {shown(value)} is no number, text, true or false")
        return value
    value = convert(name, text, "--vary")
    TrainConfig(**{name: value})  # refuses what is out of range
    return value


def applied(config: TrainConfig, varied: Sequence[Vary], values: Mapping[str, Any]) -> TrainConfig:
    """The configuration with the values of a trial."""
    options = {one.name: values[one.name] for one in varied if not one.is_arch}
    arch = {one.name: values[one.name] for one in varied if one.is_arch}
    return dataclasses.replace(config, **options, arch=config.arch | arch)
