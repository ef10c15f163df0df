"""Sound files of every format, made here: python -m tests.fuzz.seeds FOLDER."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vit
from PIL import Image
from safetensors.torch import save_file
from vit.support.random import Stream, normal

NAME = "vit_tiny_patch16_224"
ARCH: dict[str, Any] = {
    **{"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1},
    **{"num_heads": 2, "num_classes": 3},
}


def model(**arch: Any) -> Any:
    """A small model none of whose parameters is a zero or a one."""
    found = vit.create(NAME, backend="reference", training=False, **(ARCH | arch))
    for name, parameter in found.named_parameters():
        parameter.data = 0.2 * normal(tuple(parameter.shape), "fuzz", name) + (name.endswith("norm.weight"))
    return found


def make(folder: Path) -> None:
    """All seeds, a sub-folder per format."""
    for maker in (_tensors, _archives, _pickles, _folders, _engines, _idx, _images, _run, _texts):
        maker(folder)


def _below(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    return path


def _tensors(folder: Path) -> None:
    folder = _below(folder, "safetensors")
    state = model().state_dict()
    save_file(state, folder / "float32.safetensors", {"format": "pt"})
    save_file({key: value.bfloat16() for key, value in state.items()}, folder / "bfloat16.safetensors")
    save_file({f"module.{key}": value.half() for key, value in state.items()}, folder / "wrapped.safetensors")


def jax_arrays(found: Any) -> dict[str, np.ndarray]:
    """A model's parameters under the names and in the shapes of the original JAX code."""
    state = {key: value.float().numpy() for key, value in found.state_dict().items()}
    heads, dim = found.num_heads, found.embed_dim
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    if "pos_embed" in state:
        arrays["Transformer/posembed_input/pos_embedding"] = state["pos_embed"]
    for i in range(len(found.blocks)):
        to, of = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        for kind, other in (("kernel", "weight"), ("bias", "bias")):
            parts = np.split(state[f"{of}.attn.qkv.{other}"], 3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                shaped = part.T.reshape(dim, heads, -1) if kind == "kernel" else part.reshape(heads, -1)
                arrays[f"{to}/MultiHeadDotProductAttention_1/{name}/{kind}"] = shaped
            out = state[f"{of}.attn.proj.{other}"]
            arrays[f"{to}/MultiHeadDotProductAttention_1/out/{kind}"] = (
                out.T.reshape(heads, -1, dim) if kind == "kernel" else out
            )
            for n, layer in enumerate(("fc1", "fc2")):
                arrays[f"{to}/MlpBlock_3/Dense_{n}/{kind}"] = state[f"{of}.mlp.{layer}.{other}"].T
        for n, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{to}/LayerNorm_{n}/scale"] = state[f"{of}.{norm}.weight"]
            arrays[f"{to}/LayerNorm_{n}/bias"] = state[f"{of}.{norm}.bias"]
    return {key: np.ascontiguousarray(value) for key, value in arrays.items()}


def _archives(folder: Path) -> None:
    folder = _below(folder, "npz")
    arrays = jax_arrays(model())
    np.savez(folder / "stored.npz", **arrays)
    np.savez_compressed(folder / "compressed.npz", **arrays)
    np.savez(folder / "big-endian.npz", **{key: value.astype(">f4") for key, value in arrays.items()})


def _pickles(folder: Path) -> None:
    folder = _below(folder, "pt")
    state = model().state_dict()
    torch.save(state, folder / "state.pt")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    wrapped = {"epoch": 3, "state_dict": state, "args": argparse.Namespace(lr=0.1, model=NAME)}
    torch.save(wrapped, folder / "training.pth.tar")


def _folders(folder: Path) -> None:
    found = model()
    timm = _below(folder, "timm")
    save_file(found.state_dict(), timm / "model.safetensors", {"format": "pt"})
    config = {
        **{"architecture": NAME, "num_classes": 3, "num_features": 16, "global_pool": "token"},
        "model_args": {key: value for key, value in ARCH.items() if key != "num_classes"},
        "pretrained_cfg": {
            **{"input_size": [3, 16, 16], "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 0.9},
            **{"crop_mode": "center", "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7], "num_classes": 3},
            **{"pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head"},
            "label_names": ["a", "b", "c"],
        },
    }
    (timm / "config.json").write_text(json.dumps(config, indent=1))

    other = _below(folder, "transformers")
    save_file(_transformers_state(found), other / "model.safetensors", {"format": "pt"})
    config = {
        **{"architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 16},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "hidden_act": "gelu"},
        **{"image_size": 16, "patch_size": 8, "num_channels": 3, "layer_norm_eps": 1e-6, "qkv_bias": True},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02},
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
    }
    (other / "config.json").write_text(json.dumps(config, indent=1))
    config = {
        **{"image_processor_type": "ViTImageProcessor", "do_normalize": True, "do_rescale": True, "do_resize": True},
        **{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 3},
        **{"rescale_factor": 1 / 255, "size": {"height": 16, "width": 16}},
    }
    (other / "preprocessor_config.json").write_text(json.dumps(config, indent=1))


def _transformers_state(found: Any) -> dict[str, torch.Tensor]:
    state = {key: value.clone() for key, value in found.state_dict().items()}
    out = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
    }
    for kind in ("weight", "bias"):
        out[f"vit.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        out[f"vit.layernorm.{kind}"] = state[f"norm.{kind}"]
        out[f"classifier.{kind}"] = state[f"head.{kind}"]
        for i in range(len(found.blocks)):
            to, of = f"vit.encoder.layer.{i}", f"blocks.{i}"
            parts = state[f"{of}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                out[f"{to}.attention.attention.{name}.{kind}"] = part.clone()
            out[f"{to}.attention.output.dense.{kind}"] = state[f"{of}.attn.proj.{kind}"]
            out[f"{to}.intermediate.dense.{kind}"] = state[f"{of}.mlp.fc1.{kind}"]
            out[f"{to}.output.dense.{kind}"] = state[f"{of}.mlp.fc2.{kind}"]
            out[f"{to}.layernorm_before.{kind}"] = state[f"{of}.norm1.{kind}"]
            out[f"{to}.layernorm_after.{kind}"] = state[f"{of}.norm2.{kind}"]
    return out


def _engines(folder: Path) -> None:
    if not vit.backends()["cpu"]["available"]:
        return
    folder = _below(folder, "engine")
    found = model()
    found.class_names = ("a", "b", "c")
    for dtype in ("float32", "bfloat16", "int8"):
        vit.Engine(found, dtype).save(folder / f"{dtype}.vit")


def _idx(folder: Path) -> None:
    folder = _below(folder, "idx")
    stream = Stream("fuzz", "idx")
    for name, pack in (("plain", bytes), ("gzip", lambda data: gzip.compress(data, mtime=0))):
        _below(folder, name)
        for split, count in (("train", 12), ("t10k", 4)):
            images = stream.integers(0, 256, (count, 8, 8)).astype(np.uint8)
            labels = (np.arange(count) % 3).astype(np.uint8)
            suffix = "" if name == "plain" else ".gz"
            data = struct.pack(">4BIII", 0, 0, 8, 3, *images.shape) + images.tobytes()
            (folder / name / f"{split}-images-idx3-ubyte{suffix}").write_bytes(pack(data))
            data = struct.pack(">4BI", 0, 0, 8, 1, count) + labels.tobytes()
            (folder / name / f"{split}-labels-idx1-ubyte{suffix}").write_bytes(pack(data))


def _images(folder: Path) -> None:
    folder = _below(folder, "images")
    rgb = Image.fromarray(Stream("fuzz", "image").integers(0, 256, (20, 30, 3)).astype(np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image, options in (
        ("rgb.png", rgb, {}),
        ("turned.png", rgb, {"exif": turned}),
        ("grey.png", rgb.convert("L"), {}),
        ("bits.png", rgb.convert("1"), {}),
        ("palette.png", rgb.quantize(16), {"transparency": 3}),
        ("alpha.png", rgb.convert("RGBA"), {}),
        ("rgb.jpg", rgb, {}),
        ("turned.jpeg", rgb, {"exif": turned}),
        ("progressive.jpg", rgb, {"progressive": True}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("rgb.bmp", rgb, {}),
        ("palette.bmp", rgb.quantize(16), {}),
        ("still.gif", rgb.quantize(16), {}),
        ("moving.gif", rgb, {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}),
        ("rgb.ppm", rgb, {}),
        ("grey.pgm", rgb.convert("L"), {}),
        ("plain.tif", rgb, {}),
        ("deflate.tiff", rgb, {"compression": "tiff_adobe_deflate"}),
        ("lzw.tif", rgb, {"compression": "tiff_lzw"}),
        ("rgb.webp", rgb, {"lossless": True}),
        ("turned.webp", rgb, {"exif": turned}),
    ):
        image.save(folder / name, **options)


def _run(folder: Path) -> None:
    """A training of two epochs that was stopped one step before its end."""
    from vit.training import Interrupted, TrainConfig, train
    from vit.training.progress import Silent

    class Stop(Silent):
        steps, total = 0, 0

        def start(self, done: int, total: int, *_: Any) -> None:
            self.total = total

        def step(self, text: str) -> None:
            self.steps += 1
            if self.steps == self.total - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    small = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    config = TrainConfig(arch=small, epochs=2, batch_size=512, warmup_epochs=1.0, threads=1)
    try:
        train(config, folder / "run", display=Stop())
    except Interrupted:
        return
    raise RuntimeError("the training ended before it was stopped")


def _texts(folder: Path) -> None:
    from vit.training.config import TrainConfig

    folder = _below(folder, "config")
    (folder / "all.yaml").write_text(TrainConfig().resolved("digits").to_yaml())
    (folder / "few.yaml").write_text("epochs: 2\nlr: 0.001\narch:\n  depth: 2\n  img_size: [8, 8]\naugment: none\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(Path(sys.argv[1]))
