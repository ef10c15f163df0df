"""docs/benchmarks.md, docs/engine.md and docs/training.md say what the records say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documents_are_what_the_records_give(tables):
    for document, least in zip(tables.DOCUMENTS, (3, 1, 1), strict=True):
        text = document.read_text(encoding="utf-8")
        assert len(tables.BLOCK.findall(text)) == text.count("<!-- table ") == text.count("<!-- end -->") >= least
        assert tables.generate(text) == text, "run: python benchmarks/tables.py"


def test_the_spread_of_int8_keeps_its_limits(tables):
    """8 seeds of weights and 8 batches of images for every model and instruction-set level of the record."""
    path = tables.RESULTS / "cpu-zen5-2cores" / "int8_spread.json"
    groups: dict[tuple, list] = {}
    for record in json.loads(path.read_text(encoding="utf-8"))["records"]:
        found = groups.setdefault((record["model"], record["isa"], record["calibrated"]), [])
        found.append((record["seed"], record["cosines"]))
    for (model, isa, calibrated), found in groups.items():
        assert sorted(seed for seed, _ in found) == list(range(8))
        assert all(len(batches) == 8 for _, batches in found)
        least = min(cosine for _, batches in found for batch in batches for cosine in batch)
        assert least >= (0.9985 if calibrated else 0.998), (model, isa)


def test_models_are_named_as_in_papers(tables):
    assert tables.short("vit_base_patch16_384") == "ViT-B/16 at 384"
    assert tables.short("vit_base_patch16_224:patch_size=14:img_size=518") == "ViT-B/14 at 518"
    assert tables.short("deit_tiny_patch16_224") == "DeiT-Ti/16"
    assert tables.short("vit_digits") == "vit_digits"


def test_a_ratio_is_to_the_same_race(tables):
    def record(backend: str, batch: int, ms: float) -> dict:
        about = {"model": "vit_base_patch16_224", "mode": "inference", "dtype": "float32"}
        return about | {"backend": backend, "batch": batch, "ms_median": ms, "images_per_second": 1000 * batch / ms}

    records = [record("engine", 1, 10), record("openvino", 1, 15), record("engine", 8, 100), record("openvino", 8, 90)]
    rows = tables.peers({"records": records})
    assert rows[2:] == [
        "| ViT-B/16, float32, batch 1 | 100.0 | 66.7 (1.50) |",
        "| ViT-B/16, float32, batch 8 | 80.0 | 88.9 (0.90) |",
    ]
