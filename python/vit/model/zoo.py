"""The tables of named models and of their published weights: text files in zoo/, read when a name is first asked for.

Names, sizes, image statistics and crops are those under which timm publishes the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SATELLITE = ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143))
STATISTICS = {
    "half": HALF,
    "imagenet": IMAGENET,
    "clip": CLIP,
    "sat493m": SATELLITE,
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}

_FOLDER = Path(__file__).parent / "zoo"


@dataclass(frozen=True)
class Name:
    """Sizes of a named network: arguments of its class, and how its files are brought to another size."""

    kind: str
    arch: MappingProxyType[str, Any]
    resize: str | None = None


@dataclass(frozen=True)
class Tag:
    """What is published under name.tag: what the weights expect, where they are and where they come from."""

    name: str
    tag: str
    num_classes: int
    img_size: int
    preprocess: MappingProxyType[str, Any]
    licence: str | None
    hub: str | None
    paper: str | None

    @property
    def full(self) -> str:
        """name.tag, or the name where there is no tag."""
        return f"{self.name}.{self.tag}" if self.tag else self.name


@cache
def names() -> dict[str, Name]:
    """Every name."""
    found = {}
    for name, kind, patch, width, depth, heads, hidden, *options in (*_rows("names.txt"), *_rows("eva_names.txt")):
        sizes: dict[str, Any] = {"patch_size": int(patch), "embed_dim": int(width), "depth": int(depth)}
        sizes |= {"num_heads": int(heads), "mlp_ratio": _ratio(int(width), int(hidden))}
        more = dict(_option(text) for text in options)
        resize = more.pop("resize", None)
        found[name] = Name(kind, MappingProxyType(sizes | more), resize)
    return found


@cache
def tags() -> dict[str, Tag]:
    """Every name.tag; of a name the default first."""
    found = {}
    for full, classes, size, crop, mode, interpolation, statistics, licence, hub, paper in (
        *_rows("tags.txt"),
        *_rows("eva_tags.txt"),
    ):
        mean, std = STATISTICS[statistics]
        preprocess: dict[str, Any]
        preprocess = {"mean": mean, "std": std, "interpolation": interpolation, "crop_mode": mode}
        preprocess["crop_pct"] = float(crop)
        name, _, tag = full.partition(".")
        where = f"timm/{full}" if hub == "timm" else None if hub == "-" else hub
        found[full] = Tag(
            *(name, tag, int(classes), int(size), MappingProxyType(preprocess)),
            None if licence == "-" else licence,
            where,
            None if paper == "-" else f"https://arxiv.org/abs/{paper}",
        )
    return found


def where_weights_are(name: str) -> str:
    """How the weights of a name, or name.tag, come to a machine, with a network and without: for error texts."""
    tag = tags().get(name) or defaults().get(name.partition(".")[0])
    repository = (tag.hub if tag else None) or "organisation/name"
    return (
        f"nothing is downloaded unasked: weights='hf-hub:{repository}' fetches them; without a network pass a folder "
        "with model.safetensors and config.json of that repository, or the file alone"
    )


@cache
def defaults() -> dict[str, Tag]:
    """name -> the tag that a name alone stands for."""
    found: dict[str, Tag] = {}
    for tag in tags().values():
        found.setdefault(tag.name, tag)
    return found


@cache
def aliases() -> dict[str, str]:
    """Names that timm gave up -> name.tag."""
    return {row[0]: row[1] for row in _rows("aliases.txt")}


def _rows(file: str) -> Iterator[list[str]]:
    for line in (_FOLDER / file).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", "name")):
            yield line.split()


def _option(text: str) -> tuple[str, Any]:
    """key=value: yes and no, numbers, texts."""
    key, _, value = text.partition("=")
    if value in ("yes", "no"):
        return key, value == "yes"
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


def _ratio(width: int, hidden: int) -> float:
    """The mlp_ratio with int(width * ratio) == hidden, whatever division rounds."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
