"""`vit train`: a model from images, into a run folder."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from ..support.extras import MissingExtra
from ..support.files import to_json
from ..support.records import parse_yaml
from ..training.config import (
    AUTO,
    CHOICES,
    FIELDS,
    RANGES,
    WORDS,
    TrainConfig,
    convert,
    flag,
    from_mapping,
    in_range,
    read_yaml,
    recipe_options,
    span,
)
from ..training.recipes import defaults, recipes
from .arguments import filled

HELP = "train a model on digits (no arguments), a folder of class folders, or MNIST files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file of the options below; flags override it")
    parser.add_argument("--recipe", metavar="NAME", help="options that are known to work (see --list-recipes)")
    parser.add_argument("--out", metavar="FOLDER", help="the run folder (default: runs/<data>-<number>)")
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with this run folder, with the options it has; auto: with --out, if it holds a run, else start it",
    )
    parser.add_argument(
        "--json", action="store_true", help="end with one line of JSON; progress goes to standard error"
    )
    parser.add_argument("--print-config", action="store_true", help="print all options as YAML, and train nothing")
    parser.add_argument("--list-recipes", action="store_true", help="print the recipes (with --json as JSON), and stop")
    add_options(parser.add_argument_group("options"))


def run(args: argparse.Namespace) -> int:
    from ..training import Interrupted, RefusedChange, TrainError, TrainResult, train
    from ..training.progress import display

    if args.list_recipes:
        return _list_recipes(args.json)
    given = options_given(args)
    if args.print_config:
        return _print_config(args, given)
    show = display(sys.stderr if args.json else sys.stdout)
    try:
        if args.resume and args.resume != AUTO:
            if args.out:
                print("vit: --resume goes on in the run's own folder; leave out --out", file=sys.stderr)
                return 2
            result: TrainResult = train(resume=args.resume, display=show, changes=given)
        else:
            result = train(from_mapping(given, _where(args)), args.out, args.resume, show, given)
    except RefusedChange as refused:
        print(refused, file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except TrainError as error:
        print(error, file=sys.stderr)
        return 1
    if result.is_main:
        _report(result, show.line, args.json)
    return 0


def _report(result: Any, say: Any, as_json: bool) -> None:
    """The end of a training, in words and as JSON."""
    from .. import tasks
    from ..training import Run

    epoch = f"best epoch {result.best_epoch}, {result.seconds:.1f} s"
    task = tasks.get(Run.open(result.run).config.task)
    figures = {f"test_{name}": value for name, value in task.figures(result.test).items()} if result.test else {}
    if result.test:
        share = 100 * figures[f"test_{task.metric}"]
        say(
            f"test {task.metric_name} {share:.2f} % ({result.test.images} images, loss {result.test.loss:.4f}), {epoch}"
        )
    else:
        say(f"no test images, {epoch}")
    say(f"next: vit eval {result.run}    vit predict {result.run} IMAGE...")
    if as_json:
        answer = {
            "run": str(result.run),
            "test_accuracy": figures.get("test_accuracy"),
            f"test_{task.metric}": figures.get(f"test_{task.metric}"),
            "epochs": result.epochs,
            "seconds": round(result.seconds, 3),
            "backend": result.backend,
        }
        print(to_json(answer))


def _list_recipes(as_json: bool) -> int:
    if as_json:
        print(to_json([dataclasses.asdict(recipe) for recipe in recipes().values()]))
        return 0
    for recipe in recipes().values():
        print(f"{recipe.name:<16} {recipe.about}")
    return 0


def _print_config(args: argparse.Namespace, given: dict[str, Any]) -> int:
    from ..data import recipe_of
    from ..training import Run
    from ..training.resume import changed

    if args.resume and args.resume != AUTO:
        config = changed(Run.open(args.resume), given)
    else:
        config = from_mapping(given, _where(args))
        config = config.resolved(recipe_of(config.data))
    print(config.to_yaml(), end="")
    return 0


def _where(args: argparse.Namespace) -> str:
    return str(args.config or "the command line")


def options_given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a command line: those of --recipe, over them the file of --config, over them the flags."""
    where = _where(args)
    values = recipe_options(args.recipe) if args.recipe else {}
    if args.config:
        for name, value in read_yaml(args.config).items():
            values[name] = convert(name, value, where) if name in FIELDS else value  # from_mapping names unknown ones
        if "data" in values and not hasattr(args, "data"):
            _check_data(values["data"], where)
    from_flags = {name: getattr(args, name) for name in FIELDS if name != "arch" and hasattr(args, name)}
    if args.arch:
        from_flags["arch"] = (values.get("arch") or {}) | parse_arch(args.arch)
    return values | from_flags


def _check_data(data: str, where: str) -> None:
    """What nobody can read is refused with the file that says so, which later steps do not know."""
    from ..data import DataError, kind_of

    try:
        kind_of(data)
    except DataError as error:
        raise DataError(f"{error} (in {where})") from error


def parse_arch(words: list[str]) -> dict[str, Any]:
    """["embed_dim=128", "img_size=[32, 64]"] -> {"embed_dim": 128, "img_size": [32, 64]}."""
    arch = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"vit: --arch takes KEY=VALUE, for example embed_dim=128; got {word[:60]!r}")
        arch[key] = parse_yaml(value, f"--arch {key}")
    return convert("arch", arch, "the command line")


def add_options(parser: argparse._ActionsContainer) -> None:
    """One flag per option, absent from the result unless given, so that flags can override a file."""
    hints = get_type_hints(TrainConfig)
    for name, option in FIELDS.items():
        text = f"{option.metadata['help']} (default: {_default_text(name)})".replace("%", "%%")
        if name == "arch":
            parser.add_argument("--arch", nargs="+", action="extend", metavar="KEY=VALUE", help=text)
            continue
        kinds = get_args(hints[name]) or (hints[name],)
        kind: Any = next(k for k in kinds if k is not type(None))
        parser.add_argument(
            flag(name),
            type=_checked(name, _or_word(WORDS[name]) if name in WORDS else kind),
            default=argparse.SUPPRESS,
            choices=CHOICES.get(name),
            metavar=None if name in CHOICES else name.upper(),
            help=text,
        )


def _checked(name: str, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of a flag, whose values must also be in the option's range: others are bad usage."""

    def read(text: str) -> Any:
        value = filled(text) if kind is str else kind(text)
        if name in RANGES and not in_range(name, value):
            raise argparse.ArgumentTypeError(f"is {value}; allowed is {span(*RANGES[name])}")
        return value

    read.__name__ = getattr(kind, "__name__", "text")  # argparse: "invalid int value"
    return read


def _or_word(word: str) -> Callable[[str], int | str]:
    """A whole number, or a word."""

    def read(text: str) -> int | str:
        try:
            return text if text == word else int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number or {word}, got {text!r}") from None

    return read


def _default_text(name: str) -> str:
    option = FIELDS[name]
    if option.default is not None:
        return "none" if name == "arch" else str(option.default)
    try:
        options = {recipe.kind: recipe.options for recipe in defaults()}
    except MissingExtra:  # help needs no YAML
        return "by the kind of data"
    values = [f"{found[name]} for {kind}" for kind, found in options.items() if name in found]
    return ", ".join(values) or "none"
