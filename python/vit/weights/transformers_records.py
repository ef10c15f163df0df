"""The config.json beside transformers' weights: each key used, or refused by name."""

from __future__ import annotations

from typing import Any

from ..support.records import Record
from .layouts import model_types, of_model_type
from .transformers_config import classes_of, finish

FEATURES = ("Model", "Backbone", "ForPreTraining", "ForMaskedImageModeling", "ModelWithProjection")


def about(record: Record) -> dict[str, Any]:
    """What transformers' config.json says of a ViT, as arguments of Checkpoint."""
    kind = record.text("model_type")
    layout = of_model_type(kind)
    if layout is None or layout.configure is None:
        record.refuse("model_type", f"one of {', '.join(model_types())}")
    arch = layout.configure(record)
    names = _labels(record)
    classes = record.integer("num_labels", len(names) if names else None, 0)
    classifies = any("ForImageClassification" in name for name in classes_of(record))
    if classifies:
        arch["num_classes"] = 2 if classes is None else classes  # transformers' default
    elif classes_of(record):
        names = None
        if all(name.endswith(FEATURES) for name in classes_of(record)):
            arch.setdefault("num_classes", 0)
    finish(record)
    return {"arch": arch, "class_names": names, "base": layout.base}


def _labels(record: Record) -> tuple[str, ...] | None:
    labels = record.record("id2label", None) if record.raw("id2label", None) is not None else None
    if labels is None:
        return None
    values = labels.values
    if sorted(values, key=str) != sorted(map(str, range(len(values)))):
        record.refuse("id2label", f"names for the classes 0 to {len(values) - 1}")
    return tuple(labels.text(str(i)) for i in range(len(values))) or None
