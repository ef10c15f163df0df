"""Runtimes as `vit bench` compares them: each loads one exported model and maps images to logits.

A loader takes a Spec and returns run(images) -> logits, both NumPy arrays in float32: [B, C, H, W] and [B, classes].
The module imports nothing but the standard library, NumPy and the runtime it loads: run as a program it is the fresh
process that the time to the first image and the memory of a runtime are measured in.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Arch = tuple[tuple[str, Any], ...]
Run = Callable[[np.ndarray], np.ndarray]
Phases = list[dict[str, Any]]


PROFILED = 0.5  # seconds in which the engine's phases are told apart, three calls at least


class Refusal(Exception):
    """A candidate that cannot run here; the text is the reason."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What to load: the files lie in `folder` (vit.bench.exports), `arch` are sizes that differ from the name's."""

    runtime: str
    model: str
    dtype: str
    batch: int
    threads: int
    folder: str
    arch: Arch = ()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that runs; phases(images): where its time goes, for the runtime that tells."""

    run: Run
    phases: Callable[[np.ndarray], Phases] = lambda images: []


@dataclasses.dataclass(frozen=True)
class Runtime:
    """`modules` are what it imports; `refusals`: why it is not timed in a dtype, where there is more to say."""

    load: Callable[[Spec], Loaded]
    modules: tuple[str, ...]
    dtypes: tuple[str, ...]
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)


def imports(runtime: str) -> None:
    """Imports a runtime, so that its own size and time are not counted as those of the model."""
    for module in RUNTIMES[runtime].modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise Refusal(f"{error.name} is not installed: pip install 'vit-kernels[bench]'") from None


def check(runtime: str, dtype: str) -> None:
    """Refusal if a runtime is not timed in a dtype."""
    known = RUNTIMES[runtime]
    if dtype not in known.dtypes:
        raise Refusal(known.refusals.get(dtype, f"{runtime} is timed in {', '.join(known.dtypes)}"))


def load(spec: Spec) -> Loaded:
    """The model of `spec` in its runtime, ready to run; Refusal says why it cannot be."""
    check(spec.runtime, spec.dtype)
    return RUNTIMES[spec.runtime].load(spec)


def _engine(spec: Spec) -> Loaded:
    """vit.Engine, from its file of packed weights."""
    import vit

    engine = vit.Engine.load(spec.path(engine_file(spec.dtype)), num_threads=spec.threads)

    def run(images: np.ndarray) -> np.ndarray:
        return engine(images).numpy()

    def phases(images: np.ndarray) -> Phases:
        begin = time.perf_counter()
        engine(images)
        calls = int(PROFILED / (time.perf_counter() - begin))  # of 8 ms three would show one turn of the scheduler
        found = engine.profile(images, calls=min(max(calls, 3), 100))
        return [{"name": p.name, "ms": 1e3 * p.seconds, "share": p.share, "flops": p.flops} for p in found]

    return Loaded(run, phases)


def engine_file(dtype: str) -> str:
    return f"engine-{dtype}.safetensors"


def _timm(spec: Spec) -> Loaded:
    """timm's model, eager, with PyTorch's fused attention."""
    return _torch_model(spec, _timm_model(spec))


def _torch_compile(spec: Spec) -> Loaded:
    """timm's model through torch.compile, for one batch size."""
    import torch

    return _torch_model(spec, torch.compile(_timm_model(spec), dynamic=False))


def _torch_model(spec: Spec, model: Any) -> Loaded:
    import torch

    dtype = getattr(torch, spec.dtype)

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images).to(dtype)).float().numpy()

    return Loaded(run)


def _timm_model(spec: Spec) -> Any:
    import timm
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(spec.threads)
    model = timm.create_model(spec.model, **dict(spec.arch))
    model.load_state_dict(load_file(spec.path("weights.safetensors")))
    return model.eval().to(getattr(torch, spec.dtype))


def _onnxruntime(spec: Spec) -> Loaded:
    """An ONNX file on the CPU provider, all graph optimizations, the batch fixed; int8: its dynamic quantization."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec.threads
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name("batch", spec.batch)
    file = "onnx-int8.onnx" if spec.dtype == "int8" else "model.onnx"
    session = onnxruntime.InferenceSession(spec.path(file), options, providers=["CPUExecutionProvider"])
    return Loaded(lambda images: session.run(None, {"images": images})[0])


def _openvino(spec: Spec) -> Loaded:
    """OpenVINO IR, compiled for latency with the batch fixed; int8: quantized by NNCF for transformers."""
    import openvino

    core = openvino.Core()
    model = core.read_model(spec.path("openvino-int8.xml" if spec.dtype == "int8" else "openvino.xml"))
    shape = model.inputs[0].partial_shape
    shape[0] = spec.batch
    model.reshape(shape)
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": spec.threads,
        # What is left in floating point by NNCF runs in the hardware's bfloat16 where there is one: its fastest.
        "INFERENCE_PRECISION_HINT": "f32" if spec.dtype == "float32" else "bf16",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(images: np.ndarray) -> np.ndarray:
        request.infer({0: images}, share_inputs=True, share_outputs=True)
        return request.get_output_tensor(0).data

    return Loaded(run)


_NO_TORCH_INT8 = {"int8": "PyTorch's own int8 for CPUs is deprecated; its successor torchao is not compared"}

RUNTIMES = {
    "engine": Runtime(_engine, ("torch", "vit"), ("float32", "bfloat16", "int8")),
    "timm": Runtime(_timm, ("torch", "timm"), ("float32", "bfloat16", "float16", "float64"), _NO_TORCH_INT8),
    "torch-compile": Runtime(_torch_compile, ("torch", "timm"), ("float32", "bfloat16"), _NO_TORCH_INT8),
    "onnxruntime": Runtime(
        _onnxruntime,
        ("onnxruntime",),
        ("float32", "int8"),
        {"bfloat16": "ONNX Runtime's CPU provider has no bfloat16 matrix product"},
    ),
    "openvino": Runtime(_openvino, ("openvino",), ("float32", "bfloat16", "int8")),
}


def images(spec: Spec) -> np.ndarray:
    """The exported images, as many as the batch holds."""
    return np.array(np.load(spec.path("images.npy"), mmap_mode="r")[: spec.batch])


def first_image(spec: Spec) -> dict[str, float]:
    """Seconds to import, to construct and for the first batch, and the memory of the process at its largest."""
    begin = time.perf_counter()
    imports(spec.runtime)
    imported = time.perf_counter()
    loaded = load(spec)
    constructed = time.perf_counter()
    loaded.run(images(spec))
    end = time.perf_counter()
    with open("/proc/self/status", encoding="ascii") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    return {
        "import_seconds": imported - begin,
        "construct_seconds": constructed - imported,
        "first_batch_seconds": end - constructed,
        "process_memory_mb": round(peak / 1024, 1),
    }


if __name__ == "__main__":
    words = json.loads(sys.argv[1])
    words["arch"] = tuple((key, value) for key, value in words["arch"])
    print(json.dumps(first_image(Spec(**words))))
