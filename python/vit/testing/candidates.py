"""What `vit bench` times: models and ops, ours and PyTorch's, made inside a worker process."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F

from .cases import Case
from .parity import backend_ops
from .problems import DEFINITIONS, build, torch_dtype
from .workers import Candidate

#: Backward over forward work: linear and matmul have two products for one, attention five for two.
BACKWARD_WORK = {"linear": 2.0, "matmul": 2.0, "attention": 2.5, "layer_norm": 1.5, "gelu": 1.5}


def model_step(backend: str, name: str, batch: int, dtype: str, mode: str, device: str) -> Candidate:
    """One forward ("inference") or one training step ("train") of a model with random weights on random images.

    bfloat16 means bfloat16 weights and images in inference; in training float32 weights under autocast.
    `backend` "timm" is timm's model, eager, with PyTorch's fused attention.
    """
    torch.manual_seed(0)
    where, kind = torch.device(device), torch_dtype(dtype)
    training = mode == "train"
    weights = torch.float32 if training else kind
    model: Any
    if backend == "timm":
        import timm

        model = timm.create_model(name).to(where, weights)
    else:
        import vit

        model = vit.create(name, backend=backend, device=where, dtype=weights, training=training)
    channels = model.patch_embed.proj.weight.shape[1]  # of a convolution, as in every model of the list
    images = torch.randn(batch, channels, *model.patch_embed.img_size, device=where, dtype=weights)
    if training:
        return Candidate(_training(model.train(), images, kind), _wait(where))
    return Candidate(_inference(model.eval(), images), _wait(where))


def _inference(model: Any, images: torch.Tensor) -> Any:
    def step() -> None:
        with torch.inference_mode():
            model(images)

    return step


def _training(model: Any, images: torch.Tensor, dtype: torch.dtype) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labels = torch.randint(model.num_classes, (len(images),), device=images.device)

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
    amount, unit = DEFINITIONS[case.op].work(case)
    return amount * (BACKWARD_WORK[case.op] if case.direction == "bwd" else 1.0), unit


def _wait(device: torch.device) -> Any:
    if device.type == "cuda":
        return torch.cuda.synchronize
    if device.type == "xpu":
        return torch.xpu.synchronize
    return lambda: None
