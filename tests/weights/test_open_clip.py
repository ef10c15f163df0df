"""Models of open_clip, in the folders that it writes: its own output, its own pixels, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import draw
import numpy as np
import pytest
import torch
import vit
from PIL import Image
from rounding import close
from vit.weights import WeightsError

open_clip = pytest.importorskip("open_clip")
from open_clip.push_to_hf_hub import save_for_hf  # noqa: E402

TEXT = {"context_length": 8, "vocab_size": 9, "width": 32, "heads": 2, "layers": 1}
OWN = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
TIMM = {"timm_model_pretrained": False, "image_size": 32}
#: model_cfg of each kind of tower.
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"vision_cfg": OWN},
    "quick": {"vision_cfg": OWN, "quick_gelu": True},
    "scaled": {"vision_cfg": OWN | {"ls_init_value": 0.1, "mlp_ratio": 3.5, "norm_kwargs": {"eps": 1e-3}}},
    "tanh": {"vision_cfg": OWN | {"act_kwargs": {"approximate": "tanh"}}},
    "average": {"vision_cfg": OWN | {"pool_type": "avg"}},
    "clipa": {"vision_cfg": OWN | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}},
    "siglip": {
        "vision_cfg": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "embed_dim": 96,
        "custom_text": True,
    },
    "eva": {
        "vision_cfg": {"timm_model_name": "test_vit2", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160},
        "custom_text": True,
    },
    "rest": {"vision_cfg": OWN | {"image_size": 36}},
    "all tokens": {
        "vision_cfg": {"timm_model_name": "test_vit3", "timm_pool": "", "timm_proj": "", "image_size": 160},
        "custom_text": True,
    },
    "biased": {
        "vision_cfg": {"timm_model_name": "test_vit", "timm_proj": "linear", "image_size": 160, "timm_proj_bias": True},
        "custom_text": True,
    },
    "own head": {
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160},
        "custom_text": True,
    },
}


def saved(name: str, folder: Path, **preprocess: Any) -> Any:
    """open_clip's model with other weights than it draws, and its folder."""
    cfg = {"embed_dim": 24, "text_cfg": TEXT} | MODELS[name]
    kind = open_clip.CustomTextCLIP if cfg.get("custom_text") else open_clip.CLIP
    arguments = {key: value for key, value in cfg.items() if key != "custom_text"}
    model = draw.fill(kind(**arguments), 0.1).eval()
    open_clip.transform.PreprocessCfg(**preprocess)
    image = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), preprocess)
    model.visual.image_mean, model.visual.image_std = image["mean"], image["std"]
    model.visual.preprocess_cfg = image
    save_for_hf(model, SimpleNamespace(save_pretrained=lambda folder: None), cfg, str(folder), True)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_tower_gives_its_own_output(name, tmp_path):
    theirs = saved(name, tmp_path)
    ours = vit.create(weights=tmp_path, backend="reference", training=False)
    x = draw.randn(2, 3, *ours.patch_embed.img_size)
    with torch.no_grad():
        close(ours(x), theirs.encode_image(x))
    report = vit.weights.report(ours)
    assert not report.missing
    # Rotary positions (a Perception Encoder has LayerScale, too) change these small scores by less than `close` sees.
    assert report.layout == (
        "open_clip with timm's tower" if "timm_model_name" in MODELS[name]["vision_cfg"] else "OpenAI CLIP"
    )
    assert set(report.dropped.values()) <= {"the text tower", "scale and bias of a contrastive loss"}


@pytest.mark.parametrize(
    "preprocess",
    [
        {},
        {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"},
        {"interpolation": "bilinear", "mean": (0.1, 0.2, 0.3)},
        {"interpolation": "random"},
    ],
    ids=str,
)
def test_its_pixels(preprocess, tmp_path):
    theirs = saved("plain", tmp_path, **preprocess)
    ours = vit.create(weights=tmp_path, backend="reference", training=False).preprocess
    cfg = open_clip.transform.PreprocessCfg(**(theirs.visual.preprocess_cfg | {"size": 32}))
    transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
    levels = (draw.rand(50, 71, 3) * 255).numpy().astype(np.uint8)
    image = Image.fromarray(levels)
    assert torch.equal(ours(image), transform(image))


def edited(folder: Path, *keys: str, value: Any) -> Path:
    path = folder / "open_clip_config.json"
    record = json.loads(path.read_text())
    place = record
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    path.write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("keys", "value", "text"),
    [
        (("model_cfg", "vision_cfg", "surprise"), 1, "vision_cfg says 'surprise', which is not known here"),
        (("model_cfg", "vision_cfg", "attentional_pool"), True, "attentional_pool is True; it must be left out"),
        (("model_cfg", "vision_cfg", "qk_norm"), True, "qk_norm is True; it must be left out"),
        (("model_cfg", "vision_cfg", "layers"), [3, 4, 6, 3], r"layers is \[3, 4, 6, 3\]; it must be a whole number"),
        (("model_cfg", "vision_cfg", "layers"), 3, r"blocks\.2\.norm1\.weight"),
        (("model_cfg", "vision_cfg", "timm_model_name"), "resnet50", "timm_model_name is 'resnet50'; it must be the"),
        (("model_cfg", "multimodal_cfg"), {"width": 8}, "multimodal_cfg is .* it must be left out"),
        (("model_cfg", "embed_dim"), 25, "num_classes|head"),
        (("preprocess_cfg", "resize_mode"), "longest", "resize_mode is 'longest'; it must be one of shortest, squash"),
        (("preprocess_cfg", "std"), [0.5, 0.0, 0.5], "std is .* numbers above 0"),
    ],
)
def test_what_a_config_says_is_used_or_refused_by_name(keys, value, text, tmp_path):
    saved("plain", tmp_path)
    with pytest.raises(WeightsError, match=text):
        vit.create(weights=edited(tmp_path, *keys, value=value), backend="reference")


def test_the_files_of_transformers_come_first_and_a_repository_is_read_the_same(tmp_path, monkeypatch):
    """As the hub has them: a repository that holds open_clip's files alone."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    theirs = saved("quick", tmp_path / "there")
    asked: list[list[str]] = []

    def snapshot_download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        here = tmp_path / "here"
        here.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            if (tmp_path / "there" / pattern).exists():
                (here / pattern).write_bytes((tmp_path / "there" / pattern).read_bytes())
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    ours = vit.create(weights="hf-hub:someone/clip", backend="reference", training=False)
    x = draw.randn(1, 3, 32, 32)
    with torch.no_grad():
        close(ours(x), theirs.encode_image(x))
    assert asked[0][0] == "model.safetensors"
    assert ours.options.act_layer == "quick_gelu"
