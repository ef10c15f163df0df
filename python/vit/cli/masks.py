"""`vit predict` of a segmentation: the class of each pixel, as a picture."""

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


def run(args: argparse.Namespace, model: Any, items: Sequence[Item], failed: list[dict[str, Any]]) -> int:
    """Answers each image by the shares of its classes, and with --masks by two files; exit code 1 if any failed."""
    from ..tasks.segmentation import predicted_whole

    names = model.class_names or tuple(map(str, range(model.num_classes)))
    folder = Path(args.masks) if args.masks else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    answers: list[dict[str, Any]] = []
    used: set[str] = set()
    for name, read in items:
        try:
            image = model.preprocess.convert(read())
        except (ValueError, MemoryError) as error:
            failed.append({"image": name, "error": str(error) or f"vit: not enough memory for {name}"})
            continue
        mask = predicted_whole(model, image)
        counts = mask.flatten().bincount(minlength=len(names)).tolist()
        shares = {key: count / mask.numel() for key, count in zip(names, counts, strict=True) if count}
        answer = {"image": name, "shares": shares, "mask": None}
        if folder:
            answer["mask"] = str(_write(folder / _free(Path(name).stem, used), image, mask.numpy()))
        answers.append(answer)
        if not args.json:
            parts = sorted(shares.items(), key=lambda item: -item[1])
            print(printable(name))
            for key, share in parts[: args.top]:
                print(f"  {100 * share:6.2f} %  {printable(key)}")
    for item in failed:
        print(printable(item["error"]), file=sys.stderr)
    if args.json:
        print(to_json({"predictions": answers, "failed": failed}))
    return 1 if failed else 0


def _free(stem: str, used: set[str]) -> str:
    """The stem, or stem-2 ... where images of several folders have one name."""
    name, number = stem, 1
    while name in used:
        number += 1
        name = f"{stem}-{number}"
    used.add(name)
    return name


def _write(path: Path, image: Any, mask: Any) -> Path:
    """NAME.png, whose values are the classes, in colours, and NAME-painted.png, the image under them."""
    from PIL import Image

    from ..viz.masks import colours, painted

    classes = Image.fromarray(mask)
    classes.putpalette(colours(256).tobytes())
    over = Image.blend(image.convert("RGB"), Image.fromarray(painted(mask)), 0.5)
    target = path.with_name(f"{path.name}.png")
    for picture, place in ((classes, target), (over, path.with_name(f"{path.name}-painted.png"))):
        with replacing(place) as temporary:
            picture.save(temporary, format="PNG")
    return target
