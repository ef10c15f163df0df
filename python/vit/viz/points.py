"""Key points over a picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from .masks import colours

#: COCO's skeleton: what is joined by a line, where both are there.
_BONES = (
    ("left_ankle", "left_knee"), ("left_knee", "left_hip"), ("right_ankle", "right_knee"), ("right_knee", "right_hip"),
    ("left_hip", "right_hip"), ("left_shoulder", "left_hip"), ("right_shoulder", "right_hip"),
    ("left_shoulder", "right_shoulder"), ("left_shoulder", "left_elbow"), ("right_shoulder", "right_elbow"),
    ("left_elbow", "left_wrist"), ("right_elbow", "right_wrist"), ("left_eye", "right_eye"), ("nose", "left_eye"),
    ("nose", "right_eye"), ("left_eye", "left_ear"), ("right_eye", "right_ear"),
)  # fmt: skip
SMALLEST = 256  # pixels of the shorter side: a smaller picture is enlarged, so that its points can be told apart


def marked(image: Image.Image, points: Sequence[tuple[float, float] | None], names: Sequence[str]) -> Image.Image:
    """The picture with a disc at each point, in pixels of the picture, and COCO's lines between those it names; None is
    left out."""
    times = max(1, -(-SMALLEST // min(image.size)))
    drawn = image.convert("RGB").resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    pen, radius = ImageDraw.Draw(drawn), max(2.0, min(drawn.size) / 80)
    found = {
        name: (point[0] * times, point[1] * times)
        for name, point in zip(names, points, strict=True)
        if point is not None
    }
    for ends in _BONES:
        if all(end in found for end in ends):
            pen.line([found[end] for end in ends], fill=(255, 255, 255), width=max(1, round(radius / 2)))
    palette = colours(len(names) + 1)[1:]  # the first one is black
    for name, colour in zip(names, palette.tolist(), strict=True):
        if name in found:
            x, y = found[name]
            box = (x - radius, y - radius, x + radius, y + radius)
            pen.ellipse(box, fill=tuple(colour), outline=(255, 255, 255))
    return drawn
