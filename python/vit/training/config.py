"""Every option of `vit train`, in one place: the dataclass is the command line, the YAML file and the Python
API."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..support import records
from ..support.extras import require
from ..support.records import shown
from .recipes import defaults, get_recipe, of_kind

AUTO = "auto"  # of --threads: by the size of the model and the free cores
ALL = "all"  # of --keep: the weights of every epoch
#: Numbers that may also be a word.
WORDS = {"threads": AUTO, "keep": ALL}

CHOICES = {
    "logger": ("none", "tensorboard", "wandb", "trackio"),
    "augment": ("none", "affine", "elastic", "crop", "three", "randaug", "trivial"),
    "amp": ("no", "bf16", "fp16"),
    "parallel": ("ddp", "fsdp"),
    "distill": ("soft", "hard"),
    "loss": ("ce", "bce", "ce_dice"),
    "optimizer": ("adamw", "adamw8bit", "sgd", "lion", "lamb"),
    "freeze": ("no", "backbone"),
    "head_init": ("random", "probe"),
    "grad_checkpoint": ("no", "yes"),
    "bad_images": ("skip", "refuse"),
    "validate": ("decode", "header"),
    "figures": ("png", "pdf", "svg"),
}

#: Allowed values of the numbers, ends included.
RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "accumulate": (1, math.inf),
    "lr": (0.0, math.inf),
    "min_lr": (0.0, math.inf),
    "warmup_epochs": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
    "beta2": (0.0, 0.999999),
    "clip": (0.0, math.inf),
    "layer_decay": (0.0, 1.0),
    "mixup": (0.0, 4.0),
    "cutmix": (0.0, 4.0),
    "erase": (0.0, 1.0),
    "rotate": (0.0, 180.0),
    "hflip": (0.0, 1.0),
    "vflip": (0.0, 1.0),
    "jitter": (0.0, 1.0),
    "hue": (0.0, 0.5),
    "grey": (0.0, 1.0),
    "repeats": (1, 1000),
    "distill_alpha": (0.0, 1.0),
    "distill_temperature": (0.01, 1000.0),
    "patch_drop_rate": (0.0, 0.99),
    "spike": (0.0, math.inf),
    "patience": (0, math.inf),
    "crop_area": (0.01, 1.0),
    "label_smoothing": (0.0, 1.0),
    "drop_path": (0.0, 1.0),
    "ema": (0.0, 1.0),
    "val_fraction": (0.0, 1.0),
    "test_fraction": (0.0, 1.0),
    "keep": (1, 1000),
    "val_steps": (0, math.inf),
    "split_seed": (0, 2**63 - 1),
    "seed": (0, 2**63 - 1),
    "workers": (0, 1024),
    "threads": (0, 1024),
    "checkpoint_seconds": (0.0, math.inf),
    "log_seconds": (0.0, math.inf),
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training run. None means the value of the recipe for the kind of data (see `recipes`)."""

    data: str = _option(
        "digits", "digits, a folder of class folders, or another data set (docs/training.md lists them)"
    )
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
    lr: float | None = _option(None, "peak learning rate")
    min_lr: float = _option(0.0, "learning rate at the end of the cosine")
    warmup_epochs: float | None = _option(None, "epochs of linear warm-up")
    weight_decay: float = _option(0.05, "of matrices; biases, norms, position embedding and class token have none")
    beta2: float = _option(0.999, "decay of the second moment (that of the first, or sgd's momentum, is 0.9)")
    optimizer: str = _option(
        "adamw",
        "adamw8bit keeps its averages in 8 bits: a quarter of their memory; sgd has Nesterov's momentum; lion (takes a "
        "tenth of the lr, and a beta2 of 0.99) and lamb (for large batches) are timm's",
    )
    layer_decay: float = _option(1.0, "learning rate of a block, as a share of that of the block above it")
    freeze: str = _option("no", "backbone: only the classifier learns (a linear probe)")
    head_init: str = _option(
        "random",
        "probe: the classifier begins as logistic regression on the features of the training images (arXiv:2202.10054)",
    )
    grad_checkpoint: str = _option("no", "yes computes each block anew in the backward: less memory, a third more time")
    clip: float = _option(1.0, "largest norm of all gradients together; 0 does not clip")
    spike: float = _option(0.0, "leaves out a step whose loss is above so many times the running mean; 0 takes all")
    patience: int = _option(0, "epochs without a better one after which the training ends; 0 goes through all")
    loss: str = _option(
        "ce",
        "ce: cross entropy; bce: binary, of each class (DeiT III); ce_dice: of pixels, with the Dice loss",
    )
    label_smoothing: float = _option(0.1, "share of the target spread over all classes")
    mixup: float = _option(0.0, "alpha of mixup (arXiv:1710.09412): batches are blended by Beta(alpha, alpha); 0: none")
    cutmix: float = _option(0.0, "alpha of CutMix (arXiv:1905.04899); with mixup one of the two by turns of a coin")
    erase: float = _option(0.0, "probability that a random rectangle of an image is erased (arXiv:1708.04896)")
    drop_path: float | None = _option(None, "stochastic depth of the last block")
    patch_drop_rate: float = _option(
        0.0, "share of the patches that a training step leaves out (arXiv:2212.00794); all are seen in evaluation"
    )
    teacher: str | None = _option(
        None, "a model whose answers are targets, too: a run folder, weights, or a model's name (from the hub)"
    )
    teacher_model: str | None = _option(None, "the teacher's model name, for weights that do not know theirs")
    distill: str = _option("hard", "hard: the teacher's class is the target; soft: its probabilities (DeiT)")
    distill_alpha: float = _option(0.5, "share of the teacher in the loss")
    distill_temperature: float = _option(3.0, "of soft distillation: logits are divided by it")
    ema: float = _option(
        0.995,
        "decay of the averaged weights, which are the ones kept; step t uses min(this, (1 + t) / (10 + t)), so that "
        "0.995 holds from step 1,790 and 0.9 from step 80; 0 keeps the plain weights",
    )
    augment: str | None = _option(
        None,
        "affine: small shifts and rotations; elastic: larger ones and a bend, for digits; crop: random crops and "
        "mirror images; three, randaug, trivial: the same and then 3-Augment, RandAugment or TrivialAugment of "
        "torchvision",
    )
    crop_area: float = _option(0.35, "smallest share of an image's area that a random crop takes")
    rotate: float = _option(0.0, "degrees by which an image is turned at most, in either direction")
    hflip: float = _option(0.0, "probability of a mirror image, beside those of augment: crop")
    vflip: float = _option(0.0, "probability that an image is upside down, as a mirror in the water shows it")
    jitter: float = _option(0.0, "brightness, contrast and saturation are multiplied by 1 - this to 1 + this")
    hue: float = _option(0.0, "share of the circle of hues by which colours move at most, in either direction")
    grey: float = _option(0.0, "probability that an image loses its colours")
    repeats: int = _option(
        1,
        "times that an image is in a batch, each with an augmentation of its own (arXiv:1901.09335); the steps of an "
        "epoch stay as many",
    )
    amp: str = _option("no", "bf16, fp16: matmul, linear and attention in bfloat16 or float16; fp16 with a loss scale")
    parallel: str = _option(
        "ddp", "of several processes: ddp, each has the whole model; fsdp, each a share of it (FSDP2)"
    )
    val_fraction: float = _option(
        0.1, "of the training images, if the data has no validation split; 0: no validation, the last weights are kept"
    )
    test_fraction: float = _option(0.2, "of the training images, if the data has no test split; 0: no test")
    split_seed: int = _option(0, "of the drawn splits")
    seed: int = _option(0, "of initialisation, order, augmentation and stochastic depth")
    workers: int = _option(0, "processes that read images; 0 reads in the training process")
    threads: int | str | None = _option(
        None, "CPU threads of the ops; auto: by the size of the model and the free cores; 0: PyTorch's own number"
    )
    bad_images: str = _option("skip", "what to do with unusable files of a folder: both name and count them")
    validate: str = _option("decode", "how each file of a folder is checked before training")
    checkpoint_seconds: float = _option(
        60.0,
        "time between checkpoints, or 20 times as long as writing one takes, if that is more; 0: after every step. "
        "There is always one after the first step, at the end, at an error and at a signal",
    )
    keep: int | str = _option(
        1,
        "best epochs whose weights are kept, as epoch-N.safetensors where these are more than one; all: every epoch's",
    )
    val_steps: int = _option(0, "steps between validations within an epoch, besides the one at its end; 0: none")
    log_seconds: float = _option(30.0, "time between the lines about steps in a pipe or a log")
    logger: str = _option("none", "where curves go, beside metrics.jsonl; each needs the extra of its name")
    figures: str = _option("png", "format of the curves and the confusion matrix; pdf and svg come beside png")
    task: str | None = _option(None, "what the model learns: a name of vit.tasks.names()")

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not in_range(name, value):
                raise ValueError(f"vit: {flag(name)} is {value}; allowed is {span(low, high)}")
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
        return self.filled(of_kind(kind).options)

    def filled(self, options: Mapping[str, Any]) -> TrainConfig:
        """The configuration with None replaced by what `options` say."""
        known = {"task": "classification"} | dict(options)
        changes = {k: v for k, v in known.items() if getattr(self, k) is None}
        if self.model is None:  # the recipe's model has the recipe's sizes
            changes["arch"] = dict(known.get("arch") or {}) | self.arch
        return dataclasses.replace(self, **changes)

    def to_yaml(self) -> str:
        """The text of config.yaml, in the order of the fields."""
        text: str = require("yaml", "train").safe_dump(dataclasses.asdict(self), sort_keys=False)
        return text


def in_range(name: str, value: Any) -> bool:
    """Whether an option's value is in its range; its word and None are."""
    low, high = RANGES[name]
    return value is None or value == WORDS.get(name) or (low <= value <= high and not math.isinf(value))


def span(low: float, high: float) -> str:
    return f"{low} to {high}" if math.isfinite(high) else f"any number from {low}"


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

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
            raise ValueError(f"vit: unknown option {shown(key)} in {where}{hint}")
        clean[name] = convert(name, value, where)
    try:
        return TrainConfig(**clean)
    except ValueError as error:
        raise ValueError(f"{error} (in {where})") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file; ValueError when it is not a mapping of option names to values."""
    values = records.read_yaml(Path(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"vit: {path} must hold lines of 'option: value', not a {type(values).__name__}")
    names = [str(key).replace("-", "_") for key in values]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"vit: {path}: {shown(twice)} stands twice, with - and with _")
    return dict(zip(names, values.values(), strict=True))


def recipe_options(name: str) -> dict[str, Any]:
    """The options of a recipe, in their own types."""
    return {
        key: convert(key, value, f"recipe {name}") for key, value in get_recipe(name).options.items() if key in FIELDS
    }


def convert(name: str, value: Any, where: str) -> Any:
    """The value in the option's own type; YAML reads 1e-3 as text and 1 as an integer, both are fine for a
    float."""
    kinds = get_args(_HINTS[name]) or (_HINTS[name],)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    if isinstance(value, bool) and "no" in CHOICES.get(name, ()):
        return "yes" if value else "no"  # what YAML makes of them without quotes
    if name == "arch":
        return _plain_arch(value, where)
    if value == WORDS.get(name, ...):
        return value
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        if kind is str and not (isinstance(value, (str, Path)) and str(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        allowed = f"a {kind.__name__}" + (f" or {WORDS[name]}" if name in WORDS else "")
        raise ValueError(f"vit: {name} in {where} is {shown(value)}; it must be {allowed}") from None


def _plain_arch(value: Any, where: str) -> dict[str, Any]:
    """Names and plain values: a number, a text, true, false, null, or a list of them."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"vit: arch in {where} must be a mapping of argument names to values, not {shown(value)}")
    plain = (str, int, float, bool, type(None))
    for key, item in value.items():
        items = item if isinstance(item, (list, tuple)) else [item]
        if not all(isinstance(one, plain) for one in items):
            raise ValueError(
                f"vit: arch in {where}: {key} is {shown(item)}; it must be a number, a text, true, false, null or a "
                "list of them"
            )
    return {
        key: [_number(one) for one in item] if isinstance(item, list) else _number(item) for key, item in value.items()
    }


def _number(value: Any) -> Any:
    """1e-5, which YAML leaves a text, as the number it is."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def __getattr__(name: str) -> Any:
    if name == "RECIPES":  # read at the first use: the help of other commands needs no YAML
        return {recipe.kind: recipe.options for recipe in defaults()}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
