"""docs/seeds.md: every row is shown by something, its commands run on tiny data, and what it names exists."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import draw
import numpy as np
import pytest
from PIL import Image
from vit.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "seeds.md"
ROWS: dict[str, str] = dict(
    re.findall(r"^\| ([A-E]\d+) \|[^|]*\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
)

#: Commands that a test cannot give a meaning here -> the evidence that the row must have beside them.
ELSEWHERE = re.compile(r"pip install|cmake |VIT_BACKENDS=|vit data download")
#: What tiny data are too small for -> the same, smaller.
SMALLER = {"--val-steps 500": "--val-steps 2", "--keep 5": "--keep 2", "depth=1,2,4": "depth=1,2"}
TINY = {"embed_dim": "16", "depth": "1", "num_heads": "2"}
#: The grid of pictures with colours.
COLOUR = TINY | {"img_size": "32", "patch_size": "16"}


def spans(row: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", ROWS[row])


def smaller(command: str) -> list[str]:
    """The words of a command, with sizes that take a moment."""
    for text, other in SMALLER.items():
        command = command.replace(text, other)
    words = shlex.split(command)[1:]
    if {"--help", "--print-config"} & set(words) or "--resume runs/" in command:
        return words
    if words[0] == "train":
        grey = not re.search(r"photos|imagenet", command)
        own = {word.partition("=")[0] for word in words if "=" in word}
        arch = [f"{key}={value}" for key, value in (TINY if grey else COLOUR).items() if key not in own]
        size = "256" if re.search(r"--data|--recipe (?!digits)", command) is None else "8"
        size = "64" if "shapes" in words else size
        words += ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", size, "--accumulate", "1", "--amp", "no"]
        words += ["--threads", "1", "--workers", "0", *(["--arch", *arch] if arch else [])]
    elif words[0] == "sweep":
        words += ["--trials", "2", "--epochs", "1", "--batch-size", "256", "--out", "sweep"]
    elif words[:2] == ["data", "profile"]:
        words += ["--batches", "2", "--batch-size", "4", "--model", "vit_digits"]
    elif words[0] == "parity":
        words += ["--dtype", "float64" if "float64" in command else "float32", "--group", "odd", "--group", "corner"]
    return words


# ---- tiny data ----


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def pixels(*shape: int) -> np.ndarray:
    return (draw.rand(*shape).numpy() * 255).astype(np.uint8)


def pictures(folder: Path, names: list[str], side: int = 40, suffix: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(pixels(side, side, 3)).save(folder / f"{name}.{suffix}")


def write_table(path: Path, rows: int, labels: bool) -> None:
    """Kaggle's Digit Recognizer: label,pixel0,..., pixel783."""
    header = ",".join([*(["label"] if labels else []), *(f"pixel{i}" for i in range(784))])
    lines = [",".join(map(str, [*([i % 10] if labels else []), *pixels(784)])) for i in range(rows)]
    path.write_text("\n".join([header, *lines]) + "\n")


def write_data(place: Path) -> None:
    """Every name that the page's commands use."""
    draw.restart("seeds")
    (place / "mnist").mkdir()
    for split, count in (("train", 120), ("t10k", 20)):
        write_idx(place / "mnist" / f"{split}-images-idx3-ubyte", pixels(count, 28, 28))
        write_idx(place / "mnist" / f"{split}-labels-idx1-ubyte", np.arange(count) % 10)
    (place / "arrays").mkdir()
    for split, count in (("train", 60), ("test", 10)):
        np.save(place / "arrays" / f"x_{split}.npy", pixels(count, 8, 8))
        np.save(place / "arrays" / f"y_{split}.npy", np.arange(count) % 10)
    for kind in ("cat", "dog"):
        pictures(place / "photos" / kind, [f"{kind}{i}" for i in range(16)])
        for split, count in (("train", 12), ("val", 4)):
            pictures(place / "imagenet" / split / kind, [f"{kind}{i}" for i in range(count)])
    write_table(place / "train.csv", 120, labels=True)
    write_table(place / "test.csv", 5, labels=False)
    (place / "recipe.yaml").write_text("data: digits\nlr: 5.0e-4\n")
    pictures(place, ["image"], side=32)
    tiny, ids = place / "tiny-imagenet-200", ["n01443537", "n01629819"]
    for wnid in ids:
        pictures(tiny / "train" / wnid / "images", [f"{wnid}_{i}" for i in range(16)], 64, "JPEG")
    pictures(tiny / "val" / "images", [f"val_{i}" for i in range(8)], 64, "JPEG")
    notes = [f"val_{i}.JPEG\t{ids[i % 2]}\t0\t0\t63\t63" for i in range(8)]
    (tiny / "val" / "val_annotations.txt").write_text("\n".join(notes) + "\n")
    (tiny / "wnids.txt").write_text("\n".join(ids) + "\n")
    (tiny / "words.txt").write_text("\n".join(f"{wnid}\tanimal" for wnid in ids) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the commands run, with the two runs that they speak of."""
    folder = tmp_path_factory.mktemp("seeds")
    before = Path.cwd()
    os.chdir(folder)
    try:
        write_data(folder)
        for command in ("vit train --out runs/digits-1", "vit train --data photos/ --out runs/photos-1"):
            assert main(smaller(command)) == 0
        yield folder
    finally:
        os.chdir(before)


# ---- what a row promises beside exit code 0 ----


def metrics(run: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def newest() -> str:
    return str(max(Path("runs").glob("digits-*"), key=lambda path: path.stat().st_mtime_ns))


def has_phases(_: str) -> bool:
    return Path(newest(), "phases.png").is_file() and "step_ms" in metrics(newest())[0]


PROMISES: dict[str, Callable[[str], object]] = {
    "A14": lambda _: "weight_init: he_normal" in Path(newest(), "config.yaml").read_text(),
    "A21": lambda _: len(Path("sweep.csv").read_text().splitlines()) == 3,
    "A23": lambda _: Path("attention.png").is_file() and Path("rollout.png").is_file(),
    "A24": lambda _: Path("patches.png").is_file(),
    "B3": lambda _: all(Path("runs/mine", name).is_file() for name in ("model.json", "best.safetensors")),
    "B4": lambda _: Path("runs.png").is_file() and Path("runs/digits-1/curves.png").is_file(),
    "B5": lambda told: f"{100 * metrics('runs/digits-1')[-1]['test_accuracy']:.2f} %" in told,  # type: ignore[operator]
    "B7": lambda _: "lr: 0.001" in Path(newest(), "config.yaml").read_text(),
    "B14": lambda told: "images/s" in told and "forward " in told,
    "C6": lambda told: "float32" in told,
    "C10": lambda told: "warmup_epochs: 30.0" in told,
    "C13": lambda _: Path("labels.csv").read_text().startswith("image,label,split"),
    "C14": lambda _: [line["step"] for line in metrics(newest()) if "at" in line] == [2],  # of four steps
    "C18": lambda told: has_phases(told) and list(Path(newest(), "tensorboard").glob("events.*")),
    "D5": lambda _: any(Path("out").iterdir()),
    "D10": lambda _: "representation_size: 16" in Path(newest(), "config.yaml").read_text(),
    "D12": lambda _: Path(newest(), "epoch-1.safetensors").is_file(),
    "E1": lambda _: Path("submission.csv").read_text().startswith("ImageId,Label\n1,"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_shown(row: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By commands that run, or by a test, an example, a name or a page that is there."""
    shown, told = 0, ""
    for span in spans(row):
        if ELSEWHERE.match(span):
            continue
        if span.startswith("vit "):
            code = main(smaller(span))
            captured = capsys.readouterr()
            told += captured.out
            # `vit quantize` says by its code whether it recommends what it made.
            assert code == 0 or (code == 1 and "vit quantize" in span and "recommended" in told), captured.err
            shown += 1
        elif "::" in span:
            path, _, name = span.partition("::")
            assert name in functions(ROOT / path), f"{span} is no test"
            shown += 1
        elif re.fullmatch(r"(examples|benchmarks|csrc)/\S+", span):
            assert (ROOT / span).is_file(), span
            shown += 1
    for target, anchor in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", ROWS[row]):
        assert (PAGE.parent / target).is_file(), target
        assert not anchor or anchor in anchors(PAGE.parent / target), f"{target} has no #{anchor}"
        shown += 1
    assert shown, f"nothing shows row {row}: give it a command, a test, an example or a link"
    if row in PROMISES:
        assert PROMISES[row](told), told[-2000:]


def test_all_rows_of_the_seeds_are_there() -> None:
    """As many as the seed projects have, each once, and none that is read by nobody."""
    counts = {"A": 24, "B": 17, "C": 26, "D": 12, "E": 7}
    assert list(ROWS) == [f"{seed}{i}" for seed, count in counts.items() for i in range(1, count + 1)]
    page = PAGE.read_text(encoding="utf-8")
    assert len(re.findall(r"^\| [A-E]\d", page, re.MULTILINE)) == len(ROWS)
    assert PROMISES.keys() <= ROWS.keys()


@functools.cache
def functions(path: Path) -> frozenset[str]:
    found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(node.name for node in found if isinstance(node, ast.FunctionDef))


@functools.cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return frozenset(
        re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings
    )
