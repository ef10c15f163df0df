"""What `vit bench` times: models and ops, ours and PyTorch's, made inside a worker process."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ..parity.case import Case
from ..parity.problems import DEFINITIONS, build, torch_dtype
from ..parity.runner import backend_ops
from ..support.random import Stream, normal
from .runtimes import RUNTIMES, Arch, Refusal, Spec, imports, load
from .runtimes import images as exported_images
from .weights import seeded_state
from .workers import Candidate


def libraries(runtime: str, mode: str) -> None:
    """Loads what a candidate's libraries load once, so that it is not counted as memory of the model."""
    if runtime in RUNTIMES:
        imports(runtime)
    elif runtime != "timm":  # whose libraries are PyTorch itself; SYCL's runtime takes 209 MiB
        from ..backends import get

        get(runtime).unavailable()
    if mode == "train":
        torch.optim.AdamW([torch.zeros(1)])  # the first optimizer of a process imports the compiler, 77 MB


def inference_step(spec: Spec, device: str) -> Candidate:
    """One forward of a model with the weights and on the images of spec.folder.

    spec.runtime is a backend, whose model and images are of spec.dtype, or one of RUNTIMES, which get float32 images.
    """
    if spec.runtime in RUNTIMES and device == "cpu":
        loaded, images = load(spec), exported_images(spec)
        return Candidate(lambda: loaded.run(images), result=lambda out: (np.array(out), loaded.phases(images)))
    if spec.dtype == "int8":
        raise Refusal("the ops have no int8: it is the engine's")
    where, dtype = torch.device(device), torch_dtype(spec.dtype)
    weights = load_file(spec.path("weights.safetensors"))
    model = _model(spec.runtime, spec.model, spec.arch, where, dtype, training=False)
    model.load_state_dict(weights)
    pixels = torch.from_numpy(exported_images(spec)).to(where, dtype)

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model(pixels)

    return Candidate(step, _wait(where), lambda logits: (logits.float().cpu().numpy(), []))


def training_step(spec: Spec, device: str) -> Candidate:
    """One AdamW step on random weights and images: float32 weights, other dtypes by autocast."""
    if spec.dtype == "int8":
        raise Refusal("nothing is trained in int8")
    where = torch.device(device)
    model = _model(spec.runtime, spec.model, spec.arch, where, torch.float32, training=True).train()
    model.load_state_dict(seeded_state(dict(model.named_parameters())), strict=False)  # fixed positions stay
    channels = model.patch_embed.proj.weight.shape[1]  # of a convolution, as in every model of the list
    images = normal((spec.batch, channels, *model.patch_embed.img_size), "images").to(where)
    return Candidate(training(model, images, torch_dtype(spec.dtype)), _wait(where))


def _model(backend: str, name: str, arch: Arch, device: torch.device, dtype: torch.dtype, training: bool) -> Any:
    """A backend's model, or timm's, eager, with PyTorch's fused attention."""
    if backend == "timm":
        import timm

        model = timm.create_model(name, **dict(arch)).to(device, dtype)
        return model if training else model.eval()
    if backend in RUNTIMES:
        raise Refusal(f"{backend} is timed in inference on the CPU only")
    from ..factory import create

    return create(name, backend=backend, device=device, dtype=dtype, training=training, **dict(arch))


def training(model: Any, images: torch.Tensor, dtype: torch.dtype) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # as `vit train` has it
    labels = torch.from_numpy(Stream("labels").integers(0, model.num_classes, len(images))).to(images.device)

    def step() -> None:
        mixed = torch.autocast(images.device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with mixed:
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def op_step(backend: str, case: Case, device: str) -> Candidate:
    """One forward or one backward of a case; `backend` "torch" is PyTorch's own op."""
    where = torch.device(device)
    problem, definition = build(case, where), DEFINITIONS[case.op]
    ops = backend_ops(backend) if backend != "torch" else None

    def forward(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return definition.torch(case, tensors) if ops is None else definition.call(ops, case, tensors)

    if case.direction == "fwd":

        def step() -> None:
            with torch.no_grad():
                forward(problem.tensors)

        return Candidate(step, _wait(where))
    leaves = {name: x.detach().requires_grad_() for name, x in problem.tensors.items()}
    inputs, out = list(leaves.values()), forward(leaves)
    dy = problem.dy.to(out.dtype)
    return Candidate(lambda: torch.autograd.grad(out, inputs, dy, retain_graph=True), _wait(where))


def work(case: Case) -> tuple[float, str]:
    """FLOPs ("GFLOP/s") or bytes ("GB/s") of one call of a case."""
    definition = DEFINITIONS[case.op]
    amount, unit = definition.work(case)
    return amount * (definition.backward_work if case.direction == "bwd" else 1.0), unit


def _wait(device: torch.device) -> Any:
    if device.type == "cuda":
        return torch.cuda.synchronize
    if device.type == "xpu":
        return torch.xpu.synchronize
    return lambda: None
