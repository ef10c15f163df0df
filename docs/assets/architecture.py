"""Draws architecture.svg, the path of one batch; the ops and backends in it are those of the package.

python docs/assets/architecture.py
"""

from __future__ import annotations

from pathlib import Path

from vit.backends import records
from vit.ops import OPS

WIDTH, ROW, GAP, MARGIN = 880, 64, 34, 20
WHAT = {
    "reference": "plain PyTorch",
    "cpu": "C++, four instruction sets",
    "cuda": "CUDA C++",
    "sycl": "SYCL",
}


def box(x: float, y: float, width: float, title: str, text: str, kind: str) -> str:
    middle = x + width / 2
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{ROW}" rx="6"/>'
        f'<text class="title" x="{middle:.1f}" y="{y + 27:.1f}">{title}</text>'
        f'<text class="small" x="{middle:.1f}" y="{y + 48:.1f}">{text}</text>'
    )


def arrow(x: float, y: float) -> str:
    return f'<path class="arrow" d="M{x:.1f} {y + 4:.1f} v{GAP - 12}" marker-end="url(#head)"/>'


def row(y: float, boxes: list[tuple[str, str, str]], arrows: bool = True) -> list[str]:
    width = (WIDTH - 2 * MARGIN - (len(boxes) - 1) * 14) / len(boxes)
    parts = []
    for i, (title, text, kind) in enumerate(boxes):
        x = MARGIN + i * (width + 14)
        parts.append(box(x, y, width, title, text, kind))
        if arrows:
            parts.append(arrow(x + width / 2, y + ROW))
    return parts


def draw() -> str:
    backends = sorted(records(), key=lambda name: list(WHAT).index(name) if name in WHAT else len(WHAT))
    rows = [
        [("vit.create(name, backend)", "a model with timm's names, and a plan: which backend runs each op", "api")],
        [(op, "forward, backward", "op") for op in OPS],
        [("one autograd glue", "eager: 1 µs launcher; torch.compile: registered ops", "api")],
        [(name, WHAT.get(name, ""), "backend") for name in backends],
    ]
    height = 2 * MARGIN + len(rows) * ROW + (len(rows) - 1) * GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        "<style>"
        "text{font-family:system-ui,sans-serif;text-anchor:middle;fill:#1b1f24}"
        ".title{font-size:16px;font-weight:600}.small{font-size:12.5px;fill:#57606a}"
        "rect{stroke-width:1.2}.api{fill:#eef2f7;stroke:#8c99a8}.op{fill:#fff4df;stroke:#d9a13b}"
        ".backend{fill:#e2f3e8;stroke:#4f9d6c}.arrow{stroke:#8c99a8;stroke-width:1.4;fill:none}"
        "</style>",
        '<marker id="head" markerWidth="8" markerHeight="8" refX="4" refY="3" orient="auto">'
        '<path d="M0 0 L6 3 L0 6 z" fill="#8c99a8"/></marker>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for i, boxes in enumerate(rows):
        parts += row(MARGIN + i * (ROW + GAP), boxes, arrows=i < len(rows) - 1)
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    target = Path(__file__).with_suffix(".svg")
    target.write_text(draw(), encoding="utf-8")
    print(target)
