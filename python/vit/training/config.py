"""Every option of `vit train`, in one place: the dataclass is the command line, the YAML file and the Python
API."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..support.extras import require

#: The values of the options that are None in TrainConfig, by kind of data.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "vit_digits",
        "epochs": 100,
        "batch_size": 64,
        "lr": 2e-3,
        "warmup_epochs": 5.0,
        "drop_path": 0.0,
        "augment": "affine",
        # So small a model gains 1.4x from a second thread on an idle machine and loses 5x on a busy one; and with one
        # thread every machine with the same instructions gives the same bits.
        "threads": 1,
    },
    "mnist": {
        "model": "vit_mnist_demo",
        "epochs": 20,
        "batch_size": 128,
        "lr": 2e-3,
        "warmup_epochs": 1.0,
        "drop_path": 0.0,
        "augment": "affine",
        "threads": 0,
    },
    "folder": {
        "model": "vit_tiny_patch16_224",
        "epochs": 100,
        "batch_size": 64,
        "lr": 5e-4,
        "warmup_epochs": 5.0,
        "drop_path": 0.1,
        "augment": "crop",
        "threads": 0,
    },
}

CHOICES = {
    "augment": ("none", "affine", "crop"),
    "amp": ("no", "bf16"),
    "bad_images": ("skip", "refuse"),
    "validate": ("decode", "header"),
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training run. None means the value of the recipe for the kind of data (RECIPES)."""

    data: str = _option("digits", "digits, a folder of class folders, or a folder with MNIST IDX files")
    model: str | None = _option(None, "a name of vit.list_models()")
    arch: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "arguments of vit.create that differ from the named model, as KEY=VALUE"},
    )
    weights: str | None = _option(None, "weights to start from, as vit.create takes them")
    backend: str = _option("auto", "the backend of the ops; auto is the best one of this machine")
    epochs: int | None = _option(None, "passes over the training images")
    batch_size: int | None = _option(None, "images per forward pass and process")
    accumulate: int = _option(1, "forward passes per optimizer step")
    lr: float | None = _option(None, "peak learning rate of AdamW")
    min_lr: float = _option(0.0, "learning rate at the end of the cosine")
    warmup_epochs: float | None = _option(None, "epochs of linear warm-up")
    weight_decay: float = _option(0.05, "of matrices; biases, norms, position embedding and class token have none")
    beta2: float = _option(0.999, "AdamW's second moment decay (the first is 0.9)")
    clip: float = _option(1.0, "largest norm of all gradients together; 0 does not clip")
    label_smoothing: float = _option(0.1, "share of the target spread over all classes")
    drop_path: float | None = _option(None, "stochastic depth of the last block")
    ema: float = _option(0.995, "decay of the averaged weights, which are the ones kept; 0 keeps the plain weights")
    augment: str | None = _option(None, "affine: small shifts and rotations; crop: random crops and mirror images")
    amp: str = _option("no", "bf16 runs matmul, linear and attention in bfloat16 (autocast)")
    val_fraction: float = _option(0.1, "of the training images, if the data has no validation split")
    test_fraction: float = _option(0.2, "of the training images, if the data has no test split")
    split_seed: int = _option(0, "of the drawn splits")
    seed: int = _option(0, "of initialisation, order, augmentation and stochastic depth")
    workers: int = _option(0, "processes that read images; 0 reads in the training process")
    threads: int | None = _option(None, "CPU threads of the ops; 0 leaves PyTorch's own number")
    bad_images: str = _option("skip", "what to do with unusable files of a folder: both name and count them")
    validate: str = _option("decode", "how each file of a folder is checked before training")
    checkpoint_seconds: float = _option(60.0, "time between checkpoints; there is also one at the end or a signal")

    def __post_init__(self) -> None:
        for name, (low, high) in {
            "epochs": (1, math.inf),
            "batch_size": (1, math.inf),
            "accumulate": (1, math.inf),
            "lr": (0.0, math.inf),
            "min_lr": (0.0, math.inf),
            "warmup_epochs": (0.0, math.inf),
            "weight_decay": (0.0, math.inf),
            "beta2": (0.0, 1.0),
            "clip": (0.0, math.inf),
            "label_smoothing": (0.0, 1.0),
            "drop_path": (0.0, 1.0),
            "ema": (0.0, 1.0),
            "val_fraction": (0.0, 1.0),
            "test_fraction": (0.0, 1.0),
            "split_seed": (0, 2**63 - 1),
            "seed": (0, 2**63 - 1),
            "workers": (0, 1024),
            "threads": (0, 1024),
            "checkpoint_seconds": (0.0, math.inf),
        }.items():
            value = getattr(self, name)
            if value is not None and (not low <= value <= high or math.isinf(value)):
                raise ValueError(f"vit: {flag(name)} is {value}; allowed is " + _span(low, high))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"vit: {flag(name)} is {value!r}; allowed are {', '.join(choices)}")
        if self.val_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                f"vit: --val-fraction {self.val_fraction} and --test-fraction {self.test_fraction} leave no "
                "training image"
            )

    def resolved(self, kind: str) -> TrainConfig:
        """The configuration with every None replaced by the recipe of that kind of data."""
        recipe = RECIPES[kind]
        return dataclasses.replace(self, **{k: v for k, v in recipe.items() if getattr(self, k) is None})

    def to_yaml(self) -> str:
        """The text of config.yaml, in the order of the fields."""
        text: str = require("yaml", "train").safe_dump(dataclasses.asdict(self), sort_keys=False)
        return text


def _span(low: float, high: float) -> str:
    return f"{low} to {high}" if math.isfinite(high) else f"any number from {low}"


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
_HINTS = get_type_hints(TrainConfig)


def flag(name: str) -> str:
    """batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def from_mapping(values: Mapping[str, Any], where: str) -> TrainConfig:
    """A configuration from names and values; ValueError names unknown options and values of the wrong
    type."""
    clean = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(FIELDS)}"
            raise ValueError(f"vit: unknown option {key!r} in {where}{hint}")
        clean[name] = _convert(name, value, where)
    return TrainConfig(**clean)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file; ValueError when it is not a mapping of option names to values."""
    yaml = require("yaml", "train")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"vit: {path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"vit: {path} must hold lines of 'option: value', not a {type(values).__name__}")
    return values


def _convert(name: str, value: Any, where: str) -> Any:
    """The value in the option's own type; YAML reads 1e-3 as text and 1 as an integer, both are fine for a
    float."""
    kinds = get_args(_HINTS[name]) or (_HINTS[name],)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    if value is False and "no" in CHOICES.get(name, ()):
        return "no"  # what YAML makes of an unquoted no
    if name == "arch":
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            return dict(value)
        raise ValueError(f"vit: arch in {where} must be a mapping of argument names to values, not {value!r}")
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        if kind is str and not isinstance(value, (str, Path)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"vit: {name} in {where} is {value!r}; it must be a {kind.__name__}") from None


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """One flag per option, absent from the result unless given, so that flags can override a file."""
    for name, option in FIELDS.items():
        hint = _HINTS[name]
        kinds = get_args(hint) or (hint,)
        text = f"{option.metadata['help']} (default: {_default_text(name)})".replace("%", "%%")
        if name == "arch":
            parser.add_argument("--arch", nargs="+", action="extend", metavar="KEY=VALUE", help=text)
            continue
        kind = next(k for k in kinds if k is not type(None))
        parser.add_argument(
            flag(name),
            type=kind,
            default=argparse.SUPPRESS,
            choices=CHOICES.get(name),
            metavar=None if name in CHOICES else name.upper(),
            help=text,
        )


def from_arguments(args: argparse.Namespace) -> TrainConfig:
    """The configuration of a command line: the file of --config, then the flags over it."""
    values = read_yaml(args.config) if args.config else {}
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    given = {name: getattr(args, name) for name in FIELDS if name != "arch" and hasattr(args, name)}
    if args.arch:
        base = _convert("arch", values.get("arch") or {}, str(args.config))
        given["arch"] = base | parse_arch(args.arch)
    return from_mapping(values | given, str(args.config or "the command line"))


def parse_arch(words: list[str]) -> dict[str, Any]:
    """["embed_dim=128", "img_size=[32, 64]"] -> {"embed_dim": 128, "img_size": [32, 64]}."""
    yaml = require("yaml", "train")
    arch = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"vit: --arch takes KEY=VALUE, for example embed_dim=128; got {word!r}")
        arch[key] = yaml.safe_load(value)
    return arch


def _default_text(name: str) -> str:
    option = FIELDS[name]
    if option.default is None:
        values = [f"{recipe[name]} for {kind}" for kind, recipe in RECIPES.items() if name in recipe]
        return ", ".join(values) or "none"
    return "none" if name == "arch" else str(option.default)
