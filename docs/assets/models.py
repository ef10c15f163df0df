"""Writes the tables of docs/models.md from those that vit.create reads: `python docs/assets/models.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vit.model import zoo

PAGE = Path(__file__).resolve().parents[1] / "models.md"
BEGIN, END = "<!-- by docs/assets/models.py -->", "<!-- end -->"

#: What a name contains -> the heading it stands under, the first that fits; plain ViTs are left.
FAMILIES = (
    ("dinov3", "DINOv3 and EUPE"),
    ("dinov2", "DINOv2"),
    ("siglip", "SigLIP and SigLIP 2"),
    ("rope", "ViT with rotary positions"),
    ("eva", "EVA"),
    ("clip", "CLIP"),
    ("pe_", "Perception Encoder"),
    ("aimv2", "AIMv2"),
    ("deit", "DeiT"),
    ("flexivit", "FlexiViT"),
    ("reg", "ViT with registers"),
)
#: Arguments that columns of their own hold.
_COLUMNS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")


def text() -> str:
    """The part of the page between its two marks."""
    groups: dict[str, list[str]] = {}
    for name in sorted(zoo.names(), key=_natural):
        groups.setdefault(_family(name), []).append(name)
    published = sum(1 for tag in zoo.tags().values() if tag.tag and tag.hub)
    lines = [f"{len(zoo.names())} names, {published} published weights.", ""]
    for family in sorted(groups):
        lines += [f"### {family}", "", "| Name | Patch | Pixels | Width, blocks, heads, MLP | Beside the defaults |"]
        lines += ["|---|---|---|---|---|", *map(_size, groups[family]), ""]
        lines += [
            "| Weights | Classes | Pixels | Crop | Statistics | Licence | Paper |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [row for name in groups[family] for row in _weights(name)]
        lines.append("")
    lines += ["### Old names", "", "| Old | Now |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in sorted(zoo.aliases().items())]
    return "\n".join(lines)


def _size(name: str) -> str:
    arch = zoo.names()[name].arch
    hidden = int(arch["embed_dim"] * arch["mlp_ratio"])
    sizes = f"{arch['embed_dim']}, {arch['depth']}, {arch['num_heads']}, {hidden}"
    options = ", ".join(f"`{key}={value!r}`" for key, value in arch.items() if key not in _COLUMNS)
    return f"| `{name}` | {arch['patch_size']} | {zoo.defaults()[name].img_size} | {sizes} | {options} |"


def _weights(name: str) -> Iterator[str]:
    statistics = {values: key for key, values in zoo.STATISTICS.items()}
    for tag in zoo.tags().values():
        if tag.name != name or not (tag.tag and tag.hub):
            continue
        own = tag.preprocess
        crop = f"{own['crop_pct']:g}" + ("" if own["crop_mode"] == "center" else f", {own['crop_mode']}")
        crop += "" if own["interpolation"] == "bicubic" else f", {own['interpolation']}"
        paper = f"[{tag.paper.rpartition('/')[2]}]({tag.paper})" if tag.paper else ""
        kind = statistics[own["mean"], own["std"]]
        cells = (f"`{tag.full}`", tag.num_classes or "", tag.img_size, crop, kind, tag.licence or "", paper)
        yield f"| {' | '.join(map(str, cells))} |"


def _family(name: str) -> str:
    return next((family for part, family in FAMILIES if part in name.removeprefix("naflexvit")), "ViT")


def _natural(name: str) -> tuple[str, ...]:
    """224 stands before 1024."""
    return tuple(part.zfill(6) if part.isdigit() else part for part in name.split("_"))


def page() -> str:
    """The whole page as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
