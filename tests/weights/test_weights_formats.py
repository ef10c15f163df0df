"""Weights of other programs: what their files say of the model is what the model does."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import logging
import os
import pathlib
import shutil
import sys
import types
import zipfile
from pathlib import Path

import draw
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import vit
from rounding import close
from safetensors.torch import save_file
from test_weights import google_arrays
from vit.weights import WeightsError

NAME = "vit_tiny_patch16_224"
A = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
TIMM = A | {"mlp_ratio": 4.0}


def model(seed: int = 0, **arch):
    torch.manual_seed(seed)
    return vit.create(NAME, backend="reference", **(A | arch)).eval()


def noisy(seed: int = 0, **arch):
    """A model none of whose parts is a zero or a one: what is left out shows."""
    found = model(seed, **arch)
    draw.restart("noisy", seed)
    for parameter in found.parameters():
        draw.normal_(parameter, std=0.2)
    return found


def create(source, **arch):
    return vit.create(NAME, backend="reference", weights=source, **(A | arch)).eval()


@pytest.fixture
def x():
    return draw.randn(2, 3, 32, 32)


# ---- pooling ----


def test_pooling_follows_the_weights(x):
    source = noisy(global_pool="avg")
    found = create(source.state_dict())
    assert found.global_pool == "avg"
    assert torch.equal(found(x), source(x))
    with pytest.raises(WeightsError, match=r"holds fc_norm.weight.*global_pool='avg'.*model has global_pool='token'"):
        create(source.state_dict(), global_pool="token")


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("fc_norm", [None, False])
def test_the_place_of_the_last_norm_is_timms(class_token, fc_norm, x):
    arch = {"class_token": class_token, "global_pool": "avg", "fc_norm": fc_norm}
    theirs = timm.create_model(NAME, **TIMM, **arch).eval()
    for parameter in theirs.parameters():
        draw.normal_(parameter, std=0.2)
    given = arch if class_token and fc_norm is False else {}  # the tensors alone do not tell it from a class token's
    found = create(theirs.state_dict(), **given)
    close(found(x), theirs(x))
    engine = vit.Engine(found)
    close(engine(x), theirs(x))


def timm_folder(folder: Path, theirs, **config) -> Path:
    folder.mkdir()
    save_file(theirs.state_dict(), folder / "model.safetensors")
    record = {"architecture": NAME, "model_args": TIMM, "pretrained_cfg": {}} | config
    (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("place", ["top", "pretrained_cfg", "model_args"])
@pytest.mark.parametrize("name", [None, NAME])
def test_pooling_of_a_timm_config(place, name, tmp_path, x):
    theirs = timm.create_model(NAME, **TIMM, global_pool="avg").eval()
    config = {
        "top": {"global_pool": "avg"},
        "pretrained_cfg": {"pretrained_cfg": {"global_pool": "avg"}},
        "model_args": {"model_args": TIMM | {"global_pool": "avg"}},
    }[place]
    found = vit.create(name, weights=timm_folder(tmp_path / "m", theirs, **config), backend="reference").eval()
    close(found(x), theirs(x))


def test_a_config_that_says_average_keeps_the_norm_before_it(tmp_path, x):
    theirs = timm.create_model(NAME, **TIMM, global_pool="avg", fc_norm=False).eval()
    draw.normal_(theirs.norm.weight)
    found = vit.create(weights=timm_folder(tmp_path / "m", theirs, global_pool="avg"), backend="reference").eval()
    close(found(x), theirs(x))


def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path):
    theirs = timm.create_model(NAME, **TIMM, global_pool="avg")
    with pytest.raises(WeightsError, match=r"fc_norm\.weight"):
        vit.create(weights=timm_folder(tmp_path / "m", theirs, global_pool="token"), backend="reference")


# ---- timm's config.json ----


@pytest.mark.parametrize(("name", "more"), [(NAME, {"global_pool": "avg"}), ("deit_tiny_distilled_patch16_224", {})])
def test_everything_timm_exports_is_read(name, more, tmp_path, x):
    from timm.models import save_for_hf

    theirs = timm.create_model(name, **TIMM, **more).eval()
    save_for_hf(theirs, tmp_path / "m", model_args=TIMM | more)
    found = vit.create(weights=tmp_path / "m", backend="reference").eval()
    close(found(x), theirs(x))
    assert found.preprocess.img_size == (32, 32)


@pytest.mark.parametrize("size", [[3, 224, 224], [3, 32, 31], [3, 32, 32]], ids=str)
def test_an_input_size_beside_other_arguments_is_said(size, tmp_path, caplog):
    """timm keeps the size of before when a model is trained at another; its transform makes what the model refuses."""
    folder = timm_folder(tmp_path / "m", model(), pretrained_cfg={"input_size": size, "fixed_input_size": True})
    assert vit.create(weights=folder).preprocess.img_size == (32, 32)
    said = [line for line in caplog.messages if "input_size says images of" in line]
    assert len(said) == (size != [3, 32, 32])


def test_sizes_come_from_pretrained_cfg_as_in_timm(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, in_chans=1, num_classes=5)
    cfg = {"input_size": [1, 64, 64], "fixed_input_size": True, "num_classes": 5, "mean": [0.5], "std": [0.25]}
    cfg |= {"interpolation": "bilinear", "crop_pct": 0.8, "crop_mode": "squash", "tag": "x", "license": "mit"}
    folder = timm_folder(tmp_path / "m", theirs, model_args={}, pretrained_cfg=cfg, num_classes=5, num_features=192)
    found = vit.create(weights=folder, backend="reference")
    assert found.patch_embed.img_size == (64, 64)
    preprocess = found.preprocess
    assert (preprocess.mean, preprocess.std, preprocess.crop_pct) == ((0.5,), (0.25,), 0.8)
    assert (preprocess.interpolation, preprocess.crop_mode) == ("bilinear", "squash")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_args": {"init_values": "x"}}, "init_values"),
        ({"model_args": {"reg_tokens": -4}}, "reg_tokens"),
        ({"model_args": {"no_embed_class": 1}}, "no_embed_class"),
        ({"model_args": {"act_layer": "relu6"}}, "act_layer"),
        ({"model_args": {"qk_norm": 0.5}}, "qk_norm"),
        ({"model_args": {"mlp_layer": "moe"}}, "mlp_layer"),
        ({"model_args": {"strict_img_size": False}}, "strict_img_size"),
        ({"model_args": {"attn_layer": "x"}}, "attn_layer"),
        ({"model_args": {"depth": "2"}}, "depth"),
        ({"model_args": [1]}, "model_args"),
        ({"global_pool": "rank"}, "global_pool"),
        ({"global_pool": 3}, "global_pool"),
        ({"pretrained_cfg": {"crop_mode": "pad"}}, "crop_mode"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "std"),
        ({"pretrained_cfg": {"mean": "x"}}, "mean"),
        ({"pretrained_cfg": {"mean": []}}, "mean"),
        ({"pretrained_cfg": {"std": [0.5, 0.6]}}, "std"),
        ({"pretrained_cfg": {"classifier": "head.fc"}}, "classifier"),
        ({"pretrained_cfg": {"first_conv": "stem"}}, "first_conv"),
        ({"pretrained_cfg": {"gamma_correction": 2.2}}, "gamma_correction"),
        ({"label_names": 5}, "label_names"),
        ({"surprise": 5}, "surprise"),
        ({"architecture": 5}, "architecture"),
        ({"architecture": ""}, "architecture"),
        ({"architecture": "../x"}, "architecture"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_timm_config_says_is_used_or_refused_by_name(change, key, tmp_path):
    folder = timm_folder(tmp_path / "m", model(), **change)
    with pytest.raises(WeightsError, match=rf"config.json.*{key}"):
        vit.create(weights=folder)


@pytest.mark.parametrize("cfg", [{"std": [1e-45, 1, 1]}, {"mean": [1e39, 0, 0]}], ids=lambda cfg: "-".join(cfg))
def test_statistics_that_give_infinite_images_are_refused(cfg, tmp_path):
    folder = timm_folder(tmp_path / "m", model(), pretrained_cfg=cfg)
    with pytest.raises(WeightsError, match=rf"{folder}.*: preprocess: mean .* and std .* must be finite"):
        vit.create(weights=folder)


def test_a_folder_of_a_model_that_there_is_not_is_named(tmp_path):
    folder = timm_folder(tmp_path / "m", model(), architecture="resnet50")
    with pytest.raises(WeightsError, match=rf"{folder}.*: unknown model 'resnet50'; nearest: "):
        vit.create(weights=folder)
    assert torch.equal(create(folder).head.weight, model().head.weight)  # the name is given
    with pytest.raises(ValueError, match=r"^vit: unknown model 'resnet51'"):
        vit.create("resnet51", weights=folder)


# ---- JAX ----


def jax_forward(state, x, heads: int = 2):
    """The network of the JAX sources, written from them: the norm, then the class token or the mean."""
    tokens = F.conv2d(x, state["embedding/kernel"].permute(3, 2, 0, 1), state["embedding/bias"], stride=8)
    tokens = tokens.flatten(2).transpose(1, 2)
    if "pos_embedding" in state:
        tokens = tokens + state["pos_embedding"]
    if "cls" in state:
        tokens = torch.cat([state["cls"].expand(len(x), -1, -1), tokens], 1)
    norm = lambda name, y: F.layer_norm(y, y.shape[-1:], state[f"{name}/scale"], state[f"{name}/bias"], 1e-6)  # noqa: E731
    for i in range(2):
        path = f"Transformer/encoderblock_{i}"
        attn, mlp = f"{path}/MultiHeadDotProductAttention_0", f"{path}/MlpBlock_0"
        y = norm(f"{path}/LayerNorm_0", tokens)
        q, k, v = (
            torch.einsum("bnc,chd->bhnd", y, state[f"{attn}/{p}/kernel"]) + state[f"{attn}/{p}/bias"][:, None]
            for p in ("query", "key", "value")
        )
        y = F.scaled_dot_product_attention(q, k, v)
        tokens = tokens + torch.einsum("bhnd,hdc->bnc", y, state[f"{attn}/out/kernel"]) + state[f"{attn}/out/bias"]
        y = norm(f"{path}/LayerNorm_1", tokens)
        y = F.gelu(y @ state[f"{mlp}/Dense_0/kernel"] + state[f"{mlp}/Dense_0/bias"])
        tokens = tokens + y @ state[f"{mlp}/Dense_1/kernel"] + state[f"{mlp}/Dense_1/bias"]
    tokens = norm("Transformer/encoder_norm", tokens)
    pooled = tokens[:, 0] if "cls" in state else tokens.mean(1)
    return pooled @ state["head/kernel"] + state["head/bias"]


def big_vision(**arch) -> dict[str, np.ndarray]:
    source = noisy(**arch)
    if source.cls_token is None:  # google_arrays writes both
        source.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 32))
        arrays = google_arrays(source, "big_vision")
        del arrays["params/cls"]
        return arrays
    return google_arrays(source, "big_vision")


def as_tensors(arrays) -> dict[str, torch.Tensor]:
    return {key.removeprefix("params/"): torch.from_numpy(value) for key, value in arrays.items()}


GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def test_big_vision_averages_behind_the_norm(tmp_path, x):
    arrays = big_vision(**GAP)
    np.savez(tmp_path / "w.npz", **arrays)
    found = create(tmp_path / "w.npz")
    close(found(x), jax_forward(as_tensors(arrays), x))
    close(vit.Engine(found)(x), found(x))


def test_big_vision_has_positions_for_patches_alone(tmp_path, x):
    arrays = big_vision()
    arrays["params/pos_embedding"] = arrays["params/pos_embedding"][:, 1:]
    np.savez(tmp_path / "w.npz", **arrays)
    found = create(tmp_path / "w.npz")
    close(found(x), jax_forward(as_tensors(arrays), x))


def test_big_vision_without_positions_has_fixed_ones(tmp_path, x):
    arrays = big_vision(**GAP)
    del arrays["params/pos_embedding"]
    np.savez(tmp_path / "w.npz", **arrays)
    fixed = model(**GAP, pos_embed="sincos2d").pos_embed
    expected = jax_forward(as_tensors(arrays) | {"pos_embedding": fixed}, x)
    close(create(tmp_path / "w.npz")(x), expected)


@pytest.mark.parametrize("zero", [True, False])
def test_a_head_behind_a_layer_that_is_missing_is_not_used(zero, tmp_path, caplog):
    arrays = google_arrays(noisy(), "augreg")
    arrays |= {"pre_logits/kernel": np.ones((32, 32), np.float32), "pre_logits/bias": np.zeros(32, np.float32)}
    if zero:
        arrays |= {"head/kernel": arrays["head/kernel"] * 0, "head/bias": arrays["head/bias"] * 0}
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(WeightsError, match="no classifier head that this model can use"):
        vit.create(NAME, weights=tmp_path / "w.npz", **{k: v for k, v in A.items() if k != "num_classes"})
    assert "pre_logits/kernel" in caplog.text
    assert create(tmp_path / "w.npz", num_classes=0).num_classes == 0


@pytest.mark.parametrize("order", [">f4", ">f8", ">f2", "<f2", "<f8"])
def test_npz_of_any_byte_order(order, tmp_path):
    arrays = google_arrays(noisy(), "augreg")
    np.savez(tmp_path / "w.npz", **{key: value.astype(order) for key, value in arrays.items()})
    np.savez(tmp_path / "n.npz", **{key: value.astype(order[1:]).astype("f4") for key, value in arrays.items()})
    found, expected = create(tmp_path / "w.npz").state_dict(), create(tmp_path / "n.npz").state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def as_bfloat16(array: np.ndarray) -> np.ndarray:
    codes = torch.from_numpy(array).to(torch.bfloat16).view(torch.uint16).numpy()
    return codes.view("V2")


@pytest.mark.parametrize("which", ["all", "head"])
def test_npz_in_bfloat16(which, tmp_path):
    source = noisy()
    arrays = google_arrays(source, "augreg")
    np.savez(tmp_path / "w.npz", **{k: as_bfloat16(v) if which in ("all", k[:4]) else v for k, v in arrays.items()})
    found = create(tmp_path / "w.npz", num_classes=3)
    assert torch.equal(found.head.weight, source.head.weight.to(torch.bfloat16).float())


@pytest.mark.parametrize("kind", ["i4", "?", "c8", "V1", "U3", "V4", "f16"])
def test_a_member_that_cannot_be_used_is_an_error(kind, tmp_path):
    arrays = google_arrays(noisy(), "augreg")
    arrays["head/kernel"] = np.zeros((32, 3), kind)
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(WeightsError, match="head/kernel"):
        create(tmp_path / "w.npz", num_classes=3)


def test_names_an_archive_should_not_have_are_reported(tmp_path):
    arrays = big_vision(**GAP) | {"params/MAPHead_1/probe": np.zeros((1, 1, 32), np.float32)}
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(WeightsError, match="unexpected  MAPHead_1/probe"):
        create(tmp_path / "w.npz")


def test_optimizer_state_of_an_archive_is_left_out(tmp_path, caplog):
    arrays = {f"opt/target/{key}": value for key, value in google_arrays(noisy(), "augreg").items()}
    np.savez(tmp_path / "w.npz", **arrays, **{"opt/state/step": np.array(3)})
    create(tmp_path / "w.npz")
    assert "opt/state/step (state of the optimizer)" in caplog.text


# ---- transformers ----


@pytest.fixture
def theirs():
    transformers = pytest.importorskip("transformers")
    return transformers


def hf(transformers, cls="ViTForImageClassification", **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    made = transformers.ViTConfig(**(sizes | {"image_size": 32, "patch_size": 8, "num_labels": 3} | config))
    found = getattr(transformers, cls)(made).eval()
    for parameter in found.parameters():
        draw.normal_(parameter, std=0.2)
    return found


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python", "gelu_accurate"])
def test_transformers_folders(act, theirs, tmp_path, x):
    source = hf(theirs, hidden_act=act, layer_norm_eps=0.1, qkv_bias=act != "gelu_new")
    source.save_pretrained(tmp_path)
    for name in (None, NAME):
        found = vit.create(name, weights=tmp_path, backend="reference").eval()
        close(found(x), source(x).logits)
    assert found.class_names == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize("original", [True, False])
def test_transformers_names_of_both_kinds(original, theirs, tmp_path, x):
    source = hf(theirs)
    found = create(source.state_dict())
    close(found(x), source(x).logits)
    assert found.norm.eps == 1e-12
    source.save_pretrained(tmp_path, save_original_format=original, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(vit.create(weights=tmp_path, backend="reference").eval()(x), found(x))


def test_transformers_model_without_a_head(theirs, tmp_path, x, caplog):
    source = hf(theirs, "ViTModel")
    source.save_pretrained(tmp_path)
    found = vit.create(weights=tmp_path, backend="reference").eval()
    close(found(x), source(x).last_hidden_state[:, 0])
    assert "pooler.dense.weight" in caplog.text


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"hidden_act": "relu6"}, "hidden_act"),
        ({"hidden_act": "swoosh"}, "hidden_act"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps"),
        ({"qkv_bias": 1}, "qkv_bias"),
        ({"id2label": {"a": "x"}}, "id2label"),
        ({"id2label": {"0": 5}}, "id2label"),
        ({"model_type": "swin"}, "model_type"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn"),
        ({"num_hidden_layers": 3}, "blocks.2.norm1.weight"),
        ({"num_labels": 4, "id2label": None}, "num_classes 4"),
    ],
    ids=str,
)
def test_what_a_transformers_config_says_is_used_or_refused_by_name(change, key, theirs, tmp_path):
    hf(theirs).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=rf"{key}"):
        vit.create(weights=tmp_path)


PROCESSORS = {
    "default": {"size": {"height": 32, "width": 32}},
    "bicubic": {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.4, 0.5, 0.6]},
    "int": {"size": 32},
    "crop": {"size": {"height": 36, "width": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
    "no normalize": {"size": {"height": 32, "width": 32}, "do_normalize": False},
    "no rescale": {"size": {"height": 32, "width": 32}, "do_rescale": False, "image_mean": [9, 9, 9]},
    "factor": {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1]},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_transformers_pixels(name, theirs, tmp_path):
    from PIL import Image

    hf(theirs).save_pretrained(tmp_path)
    processor = theirs.ViTImageProcessor(**PROCESSORS[name])
    processor.save_pretrained(tmp_path)
    found = vit.create(weights=tmp_path, backend="reference").preprocess
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 77, 3), np.uint8))
    ours, wanted = found(image), processor(image, return_tensors="pt")["pixel_values"][0]
    # transformers resizes with torchvision, whose levels differ by at most one from Pillow's.
    level = 1.01 / 255 / min(found.std)
    assert ours.shape == wanted.shape
    assert (ours - wanted).abs().max() <= level
    assert (ours - wanted).abs().mean() <= level / 2


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"size": {"shortest_edge": 32}}, "size"),
        ({"size": {"longest_edge": 32}}, "longest_edge|height"),
        ({"size": {"height": 64, "width": 64}}, "64, 64"),
        ({"resample": 9}, "resample"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"image_mean": "x"}, "image_mean"),
        ({"do_pad": True}, "do_pad"),
        ({"do_normalize": 2}, "do_normalize"),
        ({"do_something": True}, "do_something"),
    ],
    ids=str,
)
def test_what_a_processor_says_is_used_or_refused_by_name(change, key, theirs, tmp_path):
    hf(theirs).save_pretrained(tmp_path)
    record = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}} | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(record))
    with pytest.raises(WeightsError, match=key):
        vit.create(weights=tmp_path)


# ---- wrappers ----

PREFIXES = ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.vit."]
PREFIXES += [a + b for a in PREFIXES[:4] for b in PREFIXES[:4] if a != b] + [
    "_orig_mod.module.model.backbone.",
    "a.b.c.d.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_in_any_order(prefix):
    source = model()
    found = create({prefix + key: value for key, value in source.state_dict().items()}, num_classes=3)
    assert all(torch.equal(found.state_dict()[key], value) for key, value in source.state_dict().items())


def test_blocks_that_were_compiled_one_by_one():
    source = model()
    renamed = {
        f"module.{key}".replace("blocks.1.", "blocks.1._orig_mod."): value for key, value in source.state_dict().items()
    }
    assert torch.equal(create(renamed).blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_a_probe_on_a_backbone_keeps_its_head():
    state = {
        f"{'' if key.startswith('head') else 'backbone.'}{key}": value for key, value in model().state_dict().items()
    }
    assert torch.equal(create(state).head.weight, model().head.weight)


def test_two_models_are_told_apart():
    state = model().state_dict()
    both = {f"{side}.{key}": value for side in ("base", "momentum") for key, value in state.items()}
    with pytest.raises(WeightsError, match=r"more than one model.*'base\.' and 'momentum\.'"):
        create(both)
    with pytest.raises(WeightsError, match="more than one model: a, b"):
        create({"a": state, "b": model(1).state_dict()})


def test_averaged_weights_are_preferred_and_named(caplog):
    state = model().state_dict()
    found = create({"model": model(1).state_dict(), "model_ema": state, "epoch": 3})
    assert torch.equal(found.head.weight, state["head.weight"])
    assert "model_ema was taken, not model" in caplog.text
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(1, 1)).state_dict()["n_averaged"]
    create({f"module.{key}": value for key, value in state.items()} | {"n_averaged": averaged})
    assert "n_averaged (a counter of the running average)" in caplog.text


def test_parts_of_pretraining_are_left_out_aloud(caplog):
    state = model(num_classes=0).state_dict()
    extra = {"mask_token": torch.zeros(1, 1, 32), "decoder_embed.weight": torch.zeros(4, 32)}
    extra |= {"decoder_blocks.0.attn.qkv.weight": torch.zeros(3, 4)}
    found = create({"model": state | extra}, num_classes=0)
    assert torch.equal(found.norm.weight, state["norm.weight"])
    assert "mask_token, decoder_embed.weight, decoder_blocks.0.attn.qkv.weight (for pretraining" in caplog.text
    dino = {f"module.backbone.{key}": value for key, value in state.items()}
    dino |= {"module.head.mlp.0.weight": torch.zeros(4, 32), "module.head.last_layer.weight_g": torch.zeros(4, 1)}
    create({"teacher": dino, "student": dino}, num_classes=0)
    assert "head.mlp.0.weight" in caplog.text


@pytest.mark.parametrize(
    "key",
    [
        "head_dist.weight",
        "dist_token",
        "blocks.0.ls1.gamma",
        "blocks.0.gamma_1",
        "blocks.0.attn.relative_position_bias_table",
        "reg_token",
        "rope.freqs",
        "blocks.0.attn.q_norm.weight",
        "norm_pre.weight",
        "fc.weight",
    ],
)
def test_what_another_kind_of_model_has_is_refused_by_name(key):
    with pytest.raises(WeightsError, match=rf"unexpected  {key}"):
        create(model().state_dict() | {key: torch.zeros(32)})


def checkpoint_extras() -> dict:
    return {
        "args": argparse.Namespace(lr=1e-3, output_dir=pathlib.PurePosixPath("/tmp/x"), list=[1]),
        "space": types.SimpleNamespace(a=1),
        "where": pathlib.Path("a/b"),
        "when": datetime.datetime(2026, 1, 2),
        "took": datetime.timedelta(3),
        "best": np.float64(0.5),
        "steps": np.int64(3),
        "rng": np.random.RandomState(0).get_state(),
        "order": collections.OrderedDict(a=1),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "size": torch.Size([1, 2]),
        "set": {1, 2},
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict(),
    }


@pytest.mark.parametrize(
    ("extra", "suffix"), [(extra, "pt") for extra in checkpoint_extras()] + [("args", "pth.tar"), ("args", "ckpt")]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_training_programs_open(extra, zipped, suffix, tmp_path):
    source, path = model(), tmp_path / f"w.{suffix}"
    saved = {"model": source.state_dict(), "epoch": 3, extra: checkpoint_extras()[extra]}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(create(path).head.weight, source.head.weight)


def test_settings_of_omegaconf_and_lightning_open(tmp_path):
    """Such packages are not installed here: their names are, in a pickle made with modules of the same names."""
    made = {}
    for path, kind in (
        ("omegaconf.dictconfig.DictConfig", object),
        ("lightning_fabric.utilities.data.AttributeDict", dict),
    ):
        module, _, name = path.rpartition(".")
        parents = module.split(".")
        for i in range(len(parents)):
            made.setdefault(".".join(parents[: i + 1]), types.ModuleType(".".join(parents[: i + 1])))
        setattr(made[module], name, type(name, (kind,), {"__module__": module}))
    config = made["omegaconf.dictconfig"].DictConfig()
    config.__dict__ |= {"_content": {"lr": 1}, "_parent": None}
    hyper = made["lightning_fabric.utilities.data"].AttributeDict(lr=1)
    before = dict(sys.modules)
    sys.modules.update(made)
    try:
        torch.save({"state_dict": model().state_dict(), "cfg": config, "hyper_parameters": hyper}, tmp_path / "w.ckpt")
    finally:
        for module in made:
            sys.modules.pop(module)
        sys.modules.update(before)
    assert torch.equal(create(tmp_path / "w.ckpt").head.weight, model().head.weight)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["args", "path", "array", "defaultdict"])
def test_nothing_inside_what_is_allowed_runs(place, tmp_path):
    mark, bad = tmp_path / "ran", Touch(tmp_path / "ran")
    value = {
        "args": argparse.Namespace(a=bad),
        "path": [bad],
        "array": np.array([bad], dtype=object),
        "defaultdict": collections.defaultdict(list, {"a": bad}),
    }[place]
    torch.save({"model": model().state_dict(), "x": value}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"would execute code the file names \(posix.mkdir\): refused"):
        create(tmp_path / "w.pt")
    assert not mark.exists()


def test_the_advice_for_a_refused_file_works(tmp_path):
    torch.save({"model": model().state_dict(), "x": torch.nn.Linear(1, 1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError) as error:
        create(tmp_path / "w.pt")
    assert "weights_only" not in str(error.value)
    assert "safetensors.torch.save_file(checkpoint['model'], 'x.safetensors')" in str(error.value)
    checkpoint = {"model": model().state_dict()}
    save_file(checkpoint["model"], tmp_path / "x.safetensors")
    create(tmp_path / "x.safetensors")


# ---- where files are ----


def test_hub_revisions_and_files(tmp_path, monkeypatch):
    save_file(model().state_dict(), tmp_path / "model.safetensors")
    asked = []

    def snapshot_download(repository, revision=None, allow_patterns=()):
        asked.append((repository, revision, tuple(allow_patterns)))
        return str(tmp_path)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    create("hf-hub:someone/model@v1.0")
    assert asked[0][:2] == ("someone/model", "v1.0")
    assert "preprocessor_config.json" in asked[0][2]
    create("hf-hub:someone/model")
    assert asked[1][:2] == ("someone/model", None)
    with pytest.raises(WeightsError, match="organisation/name"):
        create("hf-hub:../../etc")


def test_paths_of_every_kind(tmp_path, monkeypatch):
    save_file(model().state_dict(), tmp_path / "w.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link.safetensors").symlink_to("w.safetensors")
    odd = tmp_path / os.fsdecode(b"\xff.safetensors")
    shutil.copy(tmp_path / "w.safetensors", odd)
    upper = shutil.copy(tmp_path / "w.safetensors", tmp_path / "W.SafeTensors")
    torch.save(model().state_dict(), io.BytesIO())
    with open(tmp_path / os.fsdecode(b"\xff.pt"), "wb") as file:
        torch.save(model().state_dict(), file)
    for source in (
        "~/w.safetensors",
        tmp_path / "link.safetensors",
        odd,
        upper,
        odd.with_suffix(".pt"),
        os.fsencode(odd),
    ):
        if isinstance(source, bytes):
            with pytest.raises(TypeError, match="weights must be a path"):
                create(source)
        else:
            assert torch.equal(create(source).head.weight, model().head.weight)
    with pytest.raises(TypeError, match=r"got VisionTransformer; pass its .state_dict\(\)"):
        create(model())
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(WeightsError, match="no regular file"):
        create(tmp_path / "pipe.pt")


def test_a_folder_with_other_names_lists_them(tmp_path):
    for name in ("a.safetensors", "b.npz"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=r"pass the weights file itself: a.safetensors, b.npz"):
        create(tmp_path)


def test_parts_of_a_checkpoint_that_are_missing_or_elsewhere(tmp_path):
    state = model().state_dict()
    save_file(state, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for table, words in (
        ({"head.weight": "../x.safetensors"}, "a file of the same folder"),
        ({"head.weight": "model-2.safetensors"}, "which .* lists, does not exist"),
        ({"nothing": "model-1.safetensors"}, "lists nothing, which its files do not hold"),
        ({"head.weight": 3}, "must be a text"),
    ):
        index.write_text(json.dumps({"weight_map": table}))
        with pytest.raises((WeightsError, FileNotFoundError), match=words):
            create(tmp_path)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, "model-1.safetensors")}))
    assert torch.equal(create(tmp_path).head.weight, state["head.weight"])
    with pytest.raises(WeightsError, match="read from its folder: pass that"):
        create(index)


def test_moving_the_norm_is_said(caplog):
    with caplog.at_level(logging.INFO, "vit"):
        create(model().state_dict(), global_pool="avg")
    assert "its last norm was moved behind the mean" in caplog.text


def test_a_class_token_that_is_missing_is_named():
    state = model().state_dict()
    del state["cls_token"]
    with pytest.raises(WeightsError, match=r"missing     cls_token\n"):
        create(state)
    with pytest.raises(FileNotFoundError, match="the name is too long"):
        create("a" * 5000)


@pytest.mark.parametrize(
    ("saved", "name"), [("safetensors", "w.bin"), ("zip", "w.safetensors"), ("old", "w.safetensors")]
)
def test_the_content_decides_where_the_suffix_is_another_kinds(saved, name, tmp_path):
    state = noisy().state_dict()
    if saved == "safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=saved == "zip")
    found = vit.create(NAME, backend="reference", weights=tmp_path / name, **A).state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_program_of_torchscript_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "model.pt")
    with pytest.raises(
        WeightsError, match=r"model\.pt.*a program of TorchScript.*torch\.jit\.load\(file\)\.state_dict"
    ):
        vit.create(weights=tmp_path / "model.pt")


def test_pickled_arrays_of_numpy_are_named_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"cls_token": np.zeros((1, 1, 8), np.float32)}, tmp_path / "arrays.pt")
    with pytest.raises(WeightsError, match=r"no tensors that are parameters; .*numpy\.savez\('x\.npz', \*\*arrays\)"):
        vit.create(weights=tmp_path / "arrays.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.npz"])
def test_a_pointer_of_git_lfs_is_called_so(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(WeightsError, match=f"{name}.*pointer of Git LFS.*git lfs pull"):
        vit.create(NAME, backend="reference", weights=tmp_path / name, **A)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.npz"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b'{"message": "Not Found"}', "it is JSON"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "compressed by gzip; unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "it is an HDF5 file"),
        (b"junk of no kind at all", ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_accidents_of_downloads_are_called_so(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=rf"{name}.*{words}") as caught:
        vit.create(NAME, backend="reference", weights=tmp_path / name, **A)
    assert "weights_only" not in str(caught.value)  # as in PyTorch's advice to trust the file


@pytest.mark.parametrize(
    ("names", "way_out"),
    [
        (["head.base_layer.weight", "head.lora_A.default.weight"], "merge_and_unload"),
        (["head.parametrizations.weight.original"], "remove_parametrizations"),
        (["head.weight_v", "head.weight_g"], "remove_weight_norm"),
        (["head.weight_orig", "head.weight_mask"], "prune.remove"),
        (["norm.base_layer.weight"], "merge_and_unload"),
    ],
)
def test_layers_that_were_wrapped_when_they_were_saved_are_called_so(names, way_out):
    state = model().state_dict()
    weight = state.pop(f"{names[0].partition('.')[0]}.weight")
    with pytest.raises(WeightsError, match=rf"(?s){names[0]}.*{way_out}"):
        vit.create(NAME, backend="reference", weights=state | {name: weight.clone() for name in names}, **A)


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"model": state, "epoch": 3}], ids=["state", "checkpoint"]
)
def test_a_storage_that_is_not_as_long_as_its_record_is_refused(wrap, tmp_path):
    """A mapped file would lend the tensor bytes of the records behind it."""
    whole, changed = tmp_path / "whole.pt", tmp_path / "changed.pt"
    torch.save(wrap(noisy().state_dict()), whole)
    with zipfile.ZipFile(whole) as given, zipfile.ZipFile(changed, "w") as made:
        for member in given.infolist():
            data = given.read(member)
            if member.filename.endswith("/data/3"):
                data = data[:-4]
            made.writestr(member, data)
    assert len(vit.weights.read(whole).state) == len(noisy().state_dict())
    with pytest.raises(WeightsError, match=r"changed\.pt.*record data/3 has \d+ bytes, and the pickle says \d+"):
        vit.weights.read(changed)
