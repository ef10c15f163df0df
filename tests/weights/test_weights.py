"""Weights from every kind of file, adapted or refused with a text that helps."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import draw
import numpy as np
import pytest
import timm
import torch
import vit
from rounding import close
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models._manipulate import adapt_input_conv
from torch import Tensor
from vit.model import VisionTransformer
from vit.weights import WeightsError

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 7}


def small(seed: int = 0, **arguments) -> VisionTransformer:
    torch.manual_seed(seed)
    return vit.create(NAME, backend="reference", **(SMALL | arguments)).eval()


def same(a: VisionTransformer, b: VisionTransformer) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(small().state_dict(), path)
    return path


# ---- formats ----


@pytest.mark.parametrize("layout", ["safetensors", "pt", "pth", "bin", "legacy.pt", "dict"])
def test_formats(layout, tmp_path):
    model, path = small(), tmp_path / f"weights.{layout}"
    state = model.state_dict()
    if layout == "safetensors":
        save_file(state, path)
    elif layout != "dict":
        torch.save(state, path, _use_new_zipfile_serialization=layout != "legacy.pt")
    source = state if layout == "dict" else path
    assert same(small(1, weights=source), model)
    assert vit.weights.load(source).keys() == state.keys()
    assert same(small(1, weights=str(path) if layout != "dict" else state), model)


@pytest.mark.parametrize(
    "wrap", [lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}], ids=["model", "state_dict"]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_training_checkpoints_are_unwrapped(wrap, prefix, tmp_path):
    model = small()
    torch.save(wrap({prefix + key: value for key, value in model.state_dict().items()}), tmp_path / "w.pt")
    assert same(small(1, weights=tmp_path / "w.pt"), model)


def test_weights_in_half_precision_and_models_in_other_dtypes(tmp_path):
    state = {key: value.to(torch.bfloat16) for key, value in small().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    model = small(1, weights=tmp_path / "w.safetensors", dtype="float64")
    assert model.dtype == torch.float64
    assert all(torch.equal(model.state_dict()[key], value.double()) for key, value in state.items())


def google_arrays(model: VisionTransformer, style: str) -> dict[str, np.ndarray]:
    """The inverse of the converter, written from the JAX sources' shapes."""
    state = {key: value.double().numpy() for key, value in model.state_dict().items()}
    heads, dim = model.num_heads, model.embed_dim
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    original = style == "augreg"
    arrays["Transformer/posembed_input/pos_embedding" if original else "pos_embedding"] = state["pos_embed"]
    attention, mlp, norm2 = (1, 3, 2) if original else (0, 0, 1)
    blocks = []
    for i in range(len(model.blocks)):
        block = {
            f"LayerNorm_{n}/{k}": state[f"blocks.{i}.{norm}.{p}"]
            for n, norm in ((0, "norm1"), (norm2, "norm2"))
            for k, p in (("scale", "weight"), ("bias", "bias"))
        }
        for kind in ("weight", "bias"):
            parts = np.split(state[f"blocks.{i}.attn.qkv.{kind}"], 3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                path = f"MultiHeadDotProductAttention_{attention}/{name}"
                if kind == "weight":  # [out, in] -> [in, heads, head_dim]
                    block[f"{path}/kernel"] = part.T.reshape(dim, heads, dim // heads)
                else:
                    block[f"{path}/bias"] = part.reshape(heads, dim // heads)
        out = f"MultiHeadDotProductAttention_{attention}/out"
        block[f"{out}/kernel"] = state[f"blocks.{i}.attn.proj.weight"].T.reshape(heads, dim // heads, dim)
        block[f"{out}/bias"] = state[f"blocks.{i}.attn.proj.bias"]
        for n, layer in enumerate(("fc1", "fc2")):
            block[f"MlpBlock_{mlp}/Dense_{n}/kernel"] = state[f"blocks.{i}.mlp.{layer}.weight"].T
            block[f"MlpBlock_{mlp}/Dense_{n}/bias"] = state[f"blocks.{i}.mlp.{layer}.bias"]
        blocks.append(block)
    if style == "scanned":
        arrays |= {f"Transformer/encoderblock/{key}": np.stack([b[key] for b in blocks]) for key in blocks[0]}
    else:
        arrays |= {
            f"Transformer/encoderblock_{i}/{key}": v for i, block in enumerate(blocks) for key, v in block.items()
        }
    prefix = {"augreg": "", "big_vision": "params/", "scanned": "params/"}[style]
    return {prefix + key: np.ascontiguousarray(value, dtype=np.float32) for key, value in arrays.items()}


@pytest.mark.parametrize("style", ["augreg", "big_vision", "scanned"])
def test_google_npz(style, tmp_path):
    model = small()
    for parameter in model.parameters():
        draw.normal_(parameter, std=0.1)
    path = tmp_path / "weights.npz"
    np.savez(path, **google_arrays(model, style))
    assert same(small(1, weights=path), model)
    theirs = timm.create_model(NAME, **SMALL)  # an independent reader of the same file
    theirs.load_pretrained(str(path))
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in model.state_dict().items())


def test_transformers_layout(tmp_path):
    model = small()
    state, theirs = model.state_dict(), {}
    stem = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    layers = {
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
    }
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if key in stem:
            theirs[f"vit.{stem[key]}"] = value
        elif module == "patch_embed.proj":
            theirs[f"vit.embeddings.patch_embeddings.projection.{kind}"] = value
        elif module == "norm":
            theirs[f"vit.layernorm.{kind}"] = value
        elif module == "head":
            theirs[f"classifier.{kind}"] = value
        elif module.endswith("qkv"):
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs[f"vit.encoder.layer.{key.split('.')[1]}.attention.attention.{name}.{kind}"] = part.clone()
        else:
            _, index, rest = module.split(".", 2)
            theirs[f"vit.encoder.layer.{index}.{layers[rest]}.{kind}"] = value
    save_file(theirs, tmp_path / "model.safetensors")
    config = {
        "model_type": "vit",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "num_channels": 3,
        "id2label": {str(i): f"class {i}" for i in range(7)},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = vit.create(weights=tmp_path, backend="reference")
    assert same(found, model)
    assert found.norm.eps == 1e-12
    assert found.class_names[6] == "class 6"


@pytest.mark.parametrize("more", [{}, {"representation_size": 24}])
def test_torchvision_layout(more, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 256, num_classes=7, **more).eval()
    for parameter in theirs.parameters():
        draw.normal_(parameter, std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours, x = small(weights=tmp_path / "w.pth"), draw.randn(2, 3, 32, 32)
    close(ours(x), theirs(x))


# ---- folders ----


def make_run(folder: Path, **arch) -> VisionTransformer:
    model = small(**arch)
    folder.mkdir()
    save_file(model.state_dict(), folder / "best.safetensors")
    record = {
        "name": NAME,
        "arch": SMALL | arch,
        "class_names": [f"c{i}" for i in range(model.num_classes)],
        "preprocess": {
            "img_size": list(model.patch_embed.img_size),
            "mean": [0.1, 0.2, 0.3],
            "std": [0.5, 0.6, 0.7],
            "interpolation": "bilinear",
            "crop_pct": 0.8,
            "in_chans": 3,
        },
    }
    (folder / "model.json").write_text(json.dumps(record))
    return model


def test_run_folder_rebuilds_the_model(tmp_path):
    model = make_run(tmp_path / "run", act_layer="gelu_tanh")
    found = vit.create(weights=tmp_path / "run", backend="reference").eval()
    assert same(found, model)
    assert found.name == NAME
    assert found.act_layer == "gelu_tanh"
    assert found.class_names == tuple(f"c{i}" for i in range(7))
    assert found.preprocess.mean == (0.1, 0.2, 0.3)
    assert found.preprocess.crop_pct == 0.8
    x = draw.randn(2, 3, 32, 32)
    assert torch.equal(found(x), model(x))


def test_run_folder_at_another_size(tmp_path, caplog):
    model = make_run(tmp_path / "run", img_size=(32, 64))
    with caplog.at_level(logging.INFO, "vit"):
        found = vit.create(weights=str(tmp_path / "run"), backend="reference", img_size=(64, 48), num_classes=3)
    assert found.preprocess.img_size == (64, 48)
    expected = resample_abs_pos_embed(model.pos_embed, [8, 6], [4, 8])
    assert torch.equal(found.pos_embed, expected)
    assert "head for 7 classes was dropped, a new one for 3 classes" in caplog.text
    assert "resampled from (4, 8) to (8, 6)" in caplog.text
    assert found.class_names is None


def test_timm_folder(tmp_path):
    model = draw.fill(timm.create_model("deit_tiny_patch16_224", depth=1), 0.05)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "deit_tiny_patch16_224",
        "num_classes": 1000,
        "model_args": {"depth": 1},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "crop_pct": 0.95, "interpolation": "bilinear"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = vit.create(weights=tmp_path, backend="reference")
    assert found.name == "deit_tiny_patch16_224"
    assert torch.equal(found.head.weight, model.head.weight)
    assert (found.preprocess.crop_pct, found.preprocess.mean) == (0.95, (0.1, 0.2, 0.3))
    other = vit.create("vit_tiny_patch16_224", weights=tmp_path, backend="reference", depth=1)
    assert other.preprocess.crop_pct == 0.9  # another model was asked for: only the tensors count


def test_hub(tmp_path, monkeypatch):
    make = small()
    save_file(make.state_dict(), tmp_path / "model.safetensors")

    def snapshot_download(repository, **_):
        if repository != "someone/model":
            raise OSError("no such repository")
        return str(tmp_path)

    hub = type(sys)("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert same(small(1, weights="hf-hub:someone/model"), make)
    with pytest.raises(WeightsError, match="'hf-hub:someone/else' cannot be fetched: no such repository"):
        small(weights="hf-hub:someone/else")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match="need huggingface_hub; run: pip install"):
        small(weights="hf-hub:someone/model")


# ---- adaptation ----


def test_classes_and_channels_come_from_the_weights(tmp_path):
    save_file(small(num_classes=11, in_chans=1).state_dict(), tmp_path / "w.safetensors")
    sizes = {key: value for key, value in SMALL.items() if key != "num_classes"}
    found = vit.create(NAME, weights=tmp_path / "w.safetensors", backend="reference", **sizes)
    assert found.num_classes == 11
    assert found.patch_embed.in_chans == found.preprocess.in_chans == 1
    assert found.preprocess.mean == (0.5,)


def test_another_number_of_classes_drops_the_head_and_says_so(saved, caplog):
    found = small(1, weights=saved, num_classes=3)
    assert found.head.weight.shape == (3, 64)
    draw.check_deviation(found.head.weight, 0.02)
    assert not found.head.bias.any()
    assert torch.equal(found.norm.weight, small().norm.weight)
    assert "head for 7 classes was dropped, a new one for 3 classes was initialised" in caplog.text
    features = small(1, weights=saved, num_classes=0)
    x = torch.ones(1, 3, 32, 32)
    assert torch.equal(features.forward_features(x), small().forward_features(x))
    close(features(x), small().forward_features(x)[:, 0])


def test_weights_without_a_head(tmp_path, caplog):
    state = small(num_classes=0).state_dict()
    with pytest.raises(WeightsError, match=r"no classifier head; pass num_classes=0 .* or num_classes=N"):
        vit.create(NAME, weights=state, backend="reference", **{k: v for k, v in SMALL.items() if k != "num_classes"})
    assert small(weights=state, num_classes=4).num_classes == 4
    assert "it has no head, a new one for 4 classes" in caplog.text


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_channels_are_adapted_as_in_timm(channels, saved):
    weight = small().patch_embed.proj.weight
    found = small(1, weights=saved, in_chans=channels).patch_embed.proj.weight
    assert torch.equal(found, adapt_input_conv(channels, weight.clone()))


def test_grey_weights_in_a_colour_model():
    grey = small(in_chans=1)
    colour = small(1, weights=grey.state_dict(), in_chans=3)
    x = draw.randn(2, 1, 32, 32)
    close(colour(x.expand(-1, 3, -1, -1)), grey(x))


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_either_patch_layout_with_other_channels(kind):
    state = small(patch_embed=kind).state_dict()
    other = small(1, weights=state, in_chans=1, patch_embed="linear" if kind == "conv" else "conv")
    summed = small().patch_embed.proj.weight.sum(1)
    assert torch.equal(other.patch_embed.proj.weight.reshape(64, 8, 8), summed)


@pytest.mark.parametrize("img_size", [16, 40, (32, 64), (24, 48)])
@pytest.mark.parametrize("class_token", [True, False])
def test_positions_are_resampled_as_in_timm(img_size, class_token):
    arch = {} if class_token else {"class_token": False, "global_pool": "avg"}
    state = small(**arch).state_dict()
    found = small(1, weights=state, img_size=img_size, **arch)
    expected = resample_abs_pos_embed(
        state["pos_embed"], list(found.patch_embed.grid_size), [4, 4], num_prefix_tokens=int(class_token)
    )
    assert torch.equal(found.pos_embed, expected)
    assert found(draw.randn(1, 3, *found.patch_embed.img_size)).shape == (1, 7)


def test_rectangular_positions_are_kept_when_nothing_changes():
    model = small(img_size=(16, 64))  # 2 x 8 patches, as many as 4 x 4
    assert same(small(1, weights=model.state_dict(), img_size=(16, 64)), model)
    with pytest.raises(WeightsError, match=r"pos_embed does not fit: .* of 15 rows with 1 prefix"):
        small(weights=small(img_size=(16, 56)).state_dict())


def test_fixed_positions_follow_the_grid():
    found = small(1, weights=small(pos_embed="sincos2d").state_dict(), pos_embed="sincos2d", img_size=64)
    assert torch.equal(found.pos_embed, small(pos_embed="sincos2d", img_size=64).pos_embed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_fixed_positions_are_known_in_every_dtype(dtype):
    model = small(pos_embed="sincos2d", img_size=(16, 64))
    found = small(1, weights={key: value.to(dtype) for key, value in model.state_dict().items()}, pos_embed="sincos2d")
    assert torch.equal(found.pos_embed, small(pos_embed="sincos2d").pos_embed)


def test_fixed_positions_do_not_silently_replace_learned_ones():
    state = small().state_dict()
    with pytest.raises(WeightsError, match=r"pos_embed holds positions that were learned.* pass pos_embed='learned'"):
        small(1, weights=state, pos_embed="sincos2d")
    del state["pos_embed"]
    assert torch.equal(small(1, weights=state, pos_embed="sincos2d").head.weight, state["head.weight"])


def test_average_pooling_takes_the_norm_along(saved):
    found = small(1, weights=saved, global_pool="avg")
    assert torch.equal(found.fc_norm.weight, small().norm.weight)


# ---- errors ----


@pytest.mark.parametrize("change", [{"name": 3}, {"arch": []}, {"preprocess": "x"}, {"class_names": 3}], ids=str)
def test_a_damaged_model_json_is_named(saved, tmp_path, change):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(saved, folder / "best.safetensors")
    (folder / "model.json").write_text(json.dumps({"name": NAME, "arch": SMALL} | change))
    with pytest.raises(WeightsError, match=rf"model.json: {next(iter(change))} (is|must)"):
        vit.create(weights=folder)


def test_missing_file_and_folder(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weight.safetensors' do not exist; nearest .* weights.safetensors"):
        small(weights=tmp_path / "weight.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        small(weights=tmp_path / "nowhere" / "w.pt")
    with pytest.raises(FileNotFoundError, match=r"neither a run \(model.json\) nor model.safetensors"):
        small(weights=tmp_path)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no best.safetensors"):
        small(weights=tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(WeightsError, match=r"model.json is not JSON"):
        small(weights=tmp_path)
    (tmp_path / "model.json").write_text("[1]")
    with pytest.raises(WeightsError, match=r"model.json must hold names and values"):
        small(weights=tmp_path)
    (tmp_path / "w.onnx").touch()
    with pytest.raises(WeightsError, match=r"the suffix is not one of .safetensors, .npz"):
        small(weights=tmp_path / "w.onnx")


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "legacy.pt", "npz"])
def test_truncated_files_are_named(suffix, tmp_path):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    state = small().state_dict()
    if suffix == "safetensors":
        save_file(state, whole)
    elif suffix == "npz":
        np.savez(whole, **google_arrays(small(), "augreg"))
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=suffix == "pt")
    content = whole.read_bytes()
    for length in (0, 1, 7, 100, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError, match=rf"cut.{suffix}' \({length} bytes\) are truncated or not a"):
            small(weights=path)
    path.write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(WeightsError, match="truncated or not a"):
        small(weights=path)


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("layout", ["torch", "pickle", "pickle2", "module", "npz"])
def test_files_that_would_execute_code_are_refused(layout, tmp_path):
    mark, path = tmp_path / "executed", tmp_path / ("w.npz" if layout == "npz" else "w.pt")
    if layout == "torch":
        torch.save({"head.weight": RunsCode(mark)}, path)
    elif layout == "module":
        torch.save(torch.nn.Linear(2, 2), path)
    elif layout == "npz":
        np.savez(path, **{"embedding/kernel": np.array([RunsCode(mark)], dtype=object)})
    else:
        path.write_bytes(pickle.dumps(RunsCode(mark), protocol=2 if layout == "pickle2" else 4))
    words = (
        "holds Python objects, which are not loaded"
        if layout == "npz"
        else "would execute code .*refused. Whoever made"
    )
    with pytest.raises(WeightsError, match=words):
        small(weights=path)
    assert not mark.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value, tmp_path, caplog):
    state = small().state_dict()
    state["blocks.1.mlp.fc1.bias"][3] = value
    save_file(state, tmp_path / "w.safetensors")
    for source in (tmp_path / "w.safetensors", state):
        with pytest.raises(WeightsError, match=r"NaN or infinite values in blocks.1.mlp.fc1.bias\."):
            small(weights=source)
    found = small(weights=vit.weights.read(tmp_path / "w.safetensors", non_finite="warn"))
    assert not torch.isfinite(found.blocks[1].mlp.fc1.bias).all()
    assert "NaN or infinite values in blocks.1.mlp.fc1.bias" in caplog.text
    with pytest.raises(ValueError, match="non_finite='ignore' is not one of"):
        vit.weights.read(state, non_finite="ignore")


def test_names_that_do_not_fit_are_listed(saved):
    state = small().state_dict()
    state["block.0.attn.qkv.weight"] = state.pop("blocks.0.attn.qkv.weight")
    with pytest.raises(WeightsError) as error:
        small(weights=state)
    assert "missing     blocks.0.attn.qkv.weight\n" in str(error.value)
    assert "unexpected  block.0.attn.qkv.weight (nearest: blocks.0.attn.qkv.weight)" in str(error.value)
    with pytest.raises(WeightsError, match=r"missing     blocks.2.norm1.weight, .* and \d+ more"):
        small(weights=saved, depth=5)
    with pytest.raises(WeightsError, match=r"shape  .*blocks.0.mlp.fc1.weight \[256, 64\] instead of \[128, 64\]"):
        small(weights=saved, mlp_ratio=2.0)
    with pytest.raises(WeightsError, match=r"shape  .*patch_embed.proj.weight \[64, 3, 8, 8\] instead of"):
        small(weights=saved, patch_size=4, img_size=16, embed_dim=32, num_heads=2, num_classes=0)


def test_archives_that_lack_a_part_name_it(tmp_path):
    arrays = google_arrays(small(), "augreg")
    np.savez(tmp_path / "w.npz", **{key: value for key, value in arrays.items() if key != "embedding/bias"})
    with pytest.raises(WeightsError, match=r"w\.npz does not fit the model:\n  missing     patch_embed\.proj\.bias"):
        small(weights=tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", **(arrays | {"embedding/kernel": np.zeros((3, 3, 64), np.float32)}))
    with pytest.raises(WeightsError, match=r"w\.npz holds a tensor of another shape than its name says"):
        small(weights=tmp_path / "w.npz")


def test_weights_in_8_bits():
    state = {key: value.to(torch.float8_e4m3fn) for key, value in small().state_dict().items()}
    found = small(1, weights=state).state_dict()
    assert all(torch.equal(found[key], value.float()) for key, value in state.items())
    state["head.bias"][0] = math.nan
    with pytest.raises(WeightsError, match=r"NaN or infinite values in head\.bias\."):
        small(weights=state)


def test_no_tensors_and_no_dictionary(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="holds no tensors that are parameters; its entries: epoch"):
        small(weights=tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="no tensors that are parameters; its entries: 1"):
        small(weights={1: torch.zeros(3)})
    torch.save([torch.zeros(3)], tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="hold a list, not a state dict"):
        small(weights=tmp_path / "w.pt")


def test_failed_load_leaves_no_open_file(saved, tmp_path):
    copy = tmp_path / "copy.safetensors"
    shutil.copy(saved, copy)
    before: Tensor = small(weights=copy).head.weight.clone()
    save_file(small(3).state_dict(), copy)  # overwriting what was loaded does not reach into the model
    assert torch.equal(small(weights=saved).head.weight, before)


def test_tensors_that_share_memory_or_are_channels_last_are_written(tmp_path):
    """safetensors refuses both; a file holds each of them whole."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = vit.create("vit_tiny_patch16_224", backend="reference", **sizes).eval()
    model.blocks[1].mlp = model.blocks[0].mlp
    model.to(memory_format=torch.channels_last)
    vit.weights.save(model, tmp_path)
    images = draw.randn(2, 3, 16, 16)
    again = vit.create(weights=tmp_path, backend="reference").eval()
    assert torch.equal(again(images), model(images.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("name", ["checkpoint_path", "features_only", "scriptable"])
def test_arguments_of_timms_create_model_say_what_takes_their_place(name):
    with pytest.raises(ValueError, match=rf"no argument '{name}' of timm\.create_model: .*(weights=|model\b)"):
        vit.create("vit_tiny_patch16_224", **{name: True})


@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_edges_that_are_padded_wrote_is_read_again(dynamic, stride, tmp_path):
    """Positions are those of whole patches where sizes are dynamic, as in timm, else of all."""
    arch = {"img_size": (20, 29), "patch_size": 8, "dynamic_img_pad": True, "dynamic_img_size": dynamic}
    arch |= {"patch_stride": stride, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    model = vit.create("vit_tiny_patch16_224", backend="reference", training=False, **arch)
    vit.weights.save(model, tmp_path)
    again = vit.create(weights=tmp_path, backend="reference", training=False)
    image = draw.randn(1, 3, 20, 29)
    assert torch.equal(again(image), model(image))
