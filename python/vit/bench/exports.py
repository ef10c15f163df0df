"""One seeded model as files for every runtime: its weights, images, the reference's logits, ONNX, OpenVINO IR.

Everything is made once per folder: what a folder holds already is kept.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..support.extras import MissingExtra, require
from ..support.files import replacing
from ..support.random import Stream, normal
from . import weights
from .machine import versions
from .runtimes import Arch, Refusal, Spec, engine_file

#: Images whose logits are compared; the others of a batch are only timed.
COMPARED = 4

#: Images that NNCF calibrates on: random ones differ little from each other.
CALIBRATION_IMAGES = 32


def folder(root: str | os.PathLike[str], model: str, arch: Arch) -> str:
    """The folder of a model under `root`; another version of an exporter or of the weights gets another one."""
    made_by = versions(("torch", "timm", "onnx", "onnxruntime", "openvino", "nncf"))
    made_by["weights"] = Path(weights.__file__).read_text(encoding="utf-8")
    key = zlib.crc32(repr(sorted(made_by.items())).encode())
    path = Path(root, "-".join([model, *(f"{name}{value}" for name, value in arch), f"{key:08x}"]))
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


def export_base(model: str, arch: Arch, where: str, images: int) -> None:
    """weights.safetensors, images.npy [images, C, H, W] and reference.npy [COMPARED at most, classes], in float32."""
    import torch
    from safetensors.torch import save_file

    from ..factory import create

    file = Path(where, "weights.safetensors")
    with _once(where, file.name) as target:
        if target:
            drawn = create(model, backend="reference", training=False, **dict(arch))
            seeded = weights.seeded_state(dict(drawn.named_parameters()))
            save_file(drawn.state_dict() | seeded, target)  # fixed positions stay what they are
    if Path(where, "images.npy").exists() and len(np.load(Path(where, "images.npy"), mmap_mode="r")) >= images:
        return
    net = create(model, backend="reference", weights=file, training=False, **dict(arch))
    shape = (images, net.patch_embed.proj.weight.shape[1], *net.patch_embed.img_size)
    pixels = normal(shape, "images")
    with torch.inference_mode():
        logits = net(pixels[:COMPARED])
    for name, array in (
        ("reference.npy", logits),
        ("images.npy", pixels),
    ):  # images.npy last: it says that all is there
        with replacing(Path(where, name)) as temporary, open(temporary, "wb") as file_of_array:
            np.save(file_of_array, array.numpy())


def export(spec: Spec) -> None:
    """The files that spec.runtime loads; Refusal when an exporter is missing or fails."""
    if spec.runtime not in EXPORTERS:
        return
    try:
        with _silence():
            EXPORTERS[spec.runtime](spec)
    except MissingExtra as error:
        raise Refusal(str(error)) from None


@contextmanager
def _silence() -> Iterator[None]:
    """Without the exporters' bars and their warnings about their own future."""
    nothing = io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _timm(spec: Spec) -> Any:
    from safetensors.torch import load_file

    model = require("timm", "bench").create_model(spec.model, **dict(spec.arch))
    model.load_state_dict(load_file(spec.path("weights.safetensors")))
    return model.eval()


def _images(spec: Spec, count: int) -> np.ndarray:
    """`count` images of the size of the exported ones, others than those that are compared."""
    shape = np.load(spec.path("images.npy"), mmap_mode="r").shape[1:]
    return Stream("calibration images").standard_normal((count, *shape))


def _onnx(spec: Spec) -> None:
    import torch

    for package in ("onnx", "onnxscript"):
        require(package, "bench")
    with _once(spec.folder, "model.onnx") as target:
        if target:
            batch = torch.export.Dim("batch", min=1, max=4096)
            torch.onnx.export(
                _timm(spec), (torch.from_numpy(_images(spec, 2)),), target, dynamo=True, verbose=False,
                input_names=["images"], output_names=["logits"], dynamic_shapes=({0: batch},), external_data=True,
            )  # fmt: skip
    if spec.dtype == "int8":
        onnx, quantization = require("onnx", "bench"), require("onnxruntime.quantization", "bench")
        with _once(spec.folder, "onnx-int8.onnx") as target:
            if target:
                model = onnx.load(spec.path("model.onnx"))
                del model.graph.value_info[:]  # the quantizer transposes the head's weight, not its noted shape
                signed = quantization.QuantType.QInt8
                quantization.quantize_dynamic(model, target, per_channel=True, weight_type=signed)


def _openvino(spec: Spec) -> None:
    import torch

    openvino = require("openvino", "bench")
    with _once(spec.folder, "openvino.xml") as target:
        if target:
            converted = openvino.convert_model(_timm(spec), example_input=torch.from_numpy(_images(spec, 2)))
            images = np.load(spec.path("images.npy"), mmap_mode="r")
            converted.reshape([-1, *images.shape[1:]])
            openvino.save_model(converted, target, compress_to_fp16=False)
    if spec.dtype == "int8":
        nncf = require("nncf", "bench")
        with _once(spec.folder, "openvino-int8.xml") as target:
            if target:
                dataset = nncf.Dataset(list(_images(spec, CALIBRATION_IMAGES)[:, None]))
                model = openvino.Core().read_model(spec.path("openvino.xml"))
                quantized = nncf.quantize(
                    model, dataset, subset_size=CALIBRATION_IMAGES, model_type=nncf.ModelType.TRANSFORMER
                )
                openvino.save_model(quantized, target, compress_to_fp16=False)


def _engine(spec: Spec) -> None:
    """Made each time: an engine under development changes more often than its version."""
    from ..backends import BackendError
    from ..engine import Engine
    from ..factory import create

    model = create(spec.model, weights=spec.path("weights.safetensors"), training=False, **dict(spec.arch))
    try:
        Engine(model, dtype=spec.dtype).save(spec.path(engine_file(spec.dtype)))
    except BackendError as error:
        raise Refusal(str(error)) from None


EXPORTERS: dict[str, Callable[[Spec], None]] = {"engine": _engine, "onnxruntime": _onnx, "openvino": _openvino}


@contextmanager
def _once(where: str, name: str) -> Iterator[str | None]:
    """The path to write, None if `name` is there; it appears under its name, with its companions, when complete."""
    if Path(where, name).exists():
        yield None
        return
    unfinished = Path(where, "unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    yield str(unfinished / name)
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == name):
        file.replace(Path(where, file.name))
    unfinished.rmdir()
