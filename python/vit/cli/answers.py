"""`vit predict` of tasks that answer with more than a class: masks, key points, depths."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..support.files import replacing, to_json
from ..support.text import printable

Item = tuple[str, Callable[[], Any]]  # the name of an image, and what reads it


def task_of(source: str, given: str | None) -> str:
    """The task of a run folder, or the one that is given for weights; ValueError where they contradict."""
    from .. import tasks

    if not (Path(source) / "config.yaml").is_file():
        name = given or "classification"
        tasks.get(name)
        return name
    from ..training.run import Run

    task = str(Run.open(source).config.task or "classification")
    if given not in (None, task):
        raise ValueError(f"vit: {source} was trained for {task}, not for {given}")
    return task


def run(args: argparse.Namespace, task: Any, model: Any, items: Sequence[Item], failed: list[dict[str, Any]]) -> int:
    """Prints what the task says of each image, and with --draw writes its pictures; exit code 1 if any failed."""
    folder = Path(args.draw) if args.draw else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    answers: list[dict[str, Any]] = []
    used: set[str] = set()
    for name, read in items:
        try:
            answer = task.answer(model, read())
        except (ValueError, MemoryError) as error:
            failed.append({"image": name, "error": str(error) or f"vit: not enough memory for {name}"})
            continue
        written = _write(folder / _free(Path(name).stem, used), answer.pictures) if folder else []
        answers.append({"image": name, **answer.record, "files": written})
        if not args.json:
            print(printable(name))
            for line in answer.lines[: args.top]:
                print(f"  {printable(line)}")
    for item in failed:
        print(printable(item["error"]), file=sys.stderr)
    if args.json:
        print(to_json({"predictions": answers, "failed": failed}))
    return 1 if failed else 0


def _free(stem: str, used: set[str]) -> str:
    """The stem, or stem-2 ... where images of several folders, or several persons of one, have one name."""
    name, number = stem, 1
    while name in used:
        number += 1
        name = f"{stem}-{number}"
    used.add(name)
    return name


def _write(path: Path, pictures: dict[str, Any]) -> list[str]:
    """The pictures, each under the name and its ending; the paths."""
    targets = [path.with_name(f"{path.name}{ending}") for ending in pictures]
    for target, picture in zip(targets, pictures.values(), strict=True):
        with replacing(target) as temporary:
            picture.save(temporary, format="PNG")
    return list(map(str, targets))
