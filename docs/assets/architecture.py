"""Draws architecture.svg, the path of one batch: the ops, backends and rooms in it are those of the source tree.

python docs/assets/architecture.py
"""

from __future__ import annotations

from pathlib import Path

from vit.backends import records
from vit.ops import OPS

SOURCE = Path(__file__).resolve().parents[2]
PACKAGE = SOURCE / "python" / "vit"
WIDTH, ROW, GAP, MARGIN, SPACE = 880, 64, 34, 20, 14

Box = tuple[str, str, str]  # title, text, kind


def box(x: float, y: float, width: float, title: str, text: str, kind: str) -> str:
    middle = x + width / 2
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{ROW}" rx="6"/>'
        f'<text class="title" x="{middle:.1f}" y="{y + 27:.1f}">{title}</text>'
        f'<text class="small" x="{middle:.1f}" y="{y + 48:.1f}">{text}</text>'
    )


def arrow(x: float, y: float) -> str:
    return f'<path class="arrow" d="M{x:.1f} {y + 4:.1f} v{GAP - 12}" marker-end="url(#head)"/>'


def row(y: float, boxes: list[Box], arrows: bool) -> list[str]:
    width = (WIDTH - 2 * MARGIN - (len(boxes) - 1) * SPACE) / len(boxes)
    parts = []
    for i, (title, text, kind) in enumerate(boxes):
        x = MARGIN + i * (width + SPACE)
        parts.append(box(x, y, width, title, text, kind))
        if arrows:
            parts.append(arrow(x + width / 2, y + ROW))
    return parts


def backends() -> list[Box]:
    """Every module of vit.backends that has a record, and where its kernels lie."""
    names = sorted(records(), key=lambda name: (name != "reference", name))
    return [
        (name, f"csrc/{name}" if (SOURCE / "csrc" / name).is_dir() else "plain PyTorch", "backend") for name in names
    ]


def other_rooms() -> str:
    """The packages of python/vit that the batch does not pass through."""
    names = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return " · ".join(sorted(names - {"model", "ops", "backends"}))


def draw() -> str:
    rows: list[list[Box]] = [
        [
            (
                "vit.create(name, backend)",
                "model/: a module with timm's names, and a plan: the backend of each op",
                "api",
            )
        ],
        [(op, f"ops/{op}.py", "op") for op in OPS],
        [("one autograd glue", "ops/op.py: eager a launcher of 1 µs, under torch.compile registered ops", "api")],
        backends(),
        [(other_rooms(), "the other rooms of python/vit", "room")],
    ]
    height = 2 * MARGIN + len(rows) * ROW + (len(rows) - 1) * GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        "<style>"
        "text{font-family:system-ui,sans-serif;text-anchor:middle;fill:#1b1f24}"
        ".title{font-size:16px;font-weight:600}.small{font-size:12.5px;fill:#57606a}"
        "rect{stroke-width:1.2}.api{fill:#eef2f7;stroke:#8c99a8}.op{fill:#fff4df;stroke:#d9a13b}"
        ".backend{fill:#e2f3e8;stroke:#4f9d6c}.room{fill:#ffffff;stroke:#8c99a8}"
        ".arrow{stroke:#8c99a8;stroke-width:1.4;fill:none}"
        "</style>",
        '<marker id="head" markerWidth="8" markerHeight="8" refX="4" refY="3" orient="auto">'
        '<path d="M0 0 L6 3 L0 6 z" fill="#8c99a8"/></marker>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for i, boxes in enumerate(rows):
        parts += row(MARGIN + i * (ROW + GAP), boxes, arrows=i < len(rows) - 2)  # none to the last, which is no step
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    target = Path(__file__).with_suffix(".svg")
    target.write_text(draw(), encoding="utf-8")
    print(target)
