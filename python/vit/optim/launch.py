"""The step of AdamW: by a backend's kernel (the routine `adamw` of the native contract) or in PyTorch's operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import BackendError, NativeBackend, expect, get, records
from .blockwise import blocks_of, code, dequantize, quantize

#: The fields of vit::AdamW, in the order in which `launch` gives them.
expect(
    "adamw",
    "param grad exp_avg exp_avg_sq exp_avg_scale exp_avg_sq_scale ema code n lr beta1 beta2 eps weight_decay "
    "correction1 correction2 grad_scale ema_decay dtype context",
)
#: The same of vit::AdamWCaptured.
expect(
    "adamw_captured",
    "param grad exp_avg exp_avg_sq exp_avg_scale exp_avg_sq_scale ema code numbers n beta1 beta2 eps ema_decay dtype "
    "context",
)


def kernel_for(name: str, parameter: Tensor, packed: bool, routine: str = "adamw") -> NativeBackend | None:
    """The backend whose kernel, a routine of this name, steps a parameter; None stands for PyTorch's operations.

    name: "auto", "reference" or a backend; BackendError with the reason when that one cannot.
    """
    if name != "auto":
        backend = get(name)
        if not isinstance(backend, NativeBackend):
            return None
        if why := _refusal(backend, parameter, packed, routine):
            hint = 'Use backend="auto" or "reference".'
            raise BackendError(f"vit: backend '{name}' cannot run '{routine}': {why}. {hint}")
        return backend
    for backend in records().values():
        if isinstance(backend, NativeBackend) and _refusal(backend, parameter, packed, routine) is None:
            return backend
    return None


def _refusal(backend: NativeBackend, parameter: Tensor, packed: bool, routine: str) -> str | None:
    if parameter.device.type not in backend.device_types:
        return f"needs tensors on {' or '.join(backend.device_types)}, got {parameter.device.type}"
    if why := backend.unavailable():
        return why
    if routine not in backend.lib.fields:
        return "its compiled module has none"
    dtype = str(parameter.dtype).removeprefix("torch.")
    if parameter.dtype not in backend.dtypes:
        return f"dtype {dtype} is not one of {', '.join(str(d).removeprefix('torch.') for d in backend.dtypes)}"
    if packed and parameter.dtype == torch.float64:
        return "averages of 8 bits go with parameters of 16 and 32 bits, not float64"
    if not parameter.is_contiguous() and (packed or not _dense(parameter)):
        return f"a parameter of strides {parameter.stride()} has gaps or another order in memory"
    return None


def _dense(x: Tensor) -> bool:
    """Whether the elements of a tensor fill its memory without gaps, in whatever order: as in a tensor made like it."""
    return torch.empty_like(x, device="meta").stride() == x.stride()


def launch(
    backend: NativeBackend,
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    grad_scale: float,
) -> None:
    """One step by the backend's kernel, whose pass also scales the gradient and moves the state's `ema`."""
    gradient = _laid_out(gradient, parameter)
    (beta1, beta2), (correction1, correction2) = group["betas"], corrections(state, group)
    step: Callable[..., None] = backend.lib.adamw  # mypy does not know how many numbers `_tensors` gives
    step(
        *_tensors(parameter, gradient, state), parameter.numel(),
        float(group["lr"]), float(beta1), float(beta2), group["eps"], group["weight_decay"],
        correction1, correction2, grad_scale, group["ema_decay"] or 0.0,
        backend.codes[parameter.dtype], *backend.context(parameter.device),
    )  # fmt: skip


def launch_captured(
    backend: NativeBackend,
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    numbers: Tensor,
) -> None:
    """The same with `numbers` [4] on the device, a row of what `numbers_of` gives in the dtype of the averages."""
    gradient, (beta1, beta2) = _laid_out(gradient, parameter), group["betas"]
    step: Callable[..., None] = backend.lib.adamw_captured
    step(
        *_tensors(parameter, gradient, state), numbers.data_ptr(), parameter.numel(),
        float(beta1), float(beta2), group["eps"], group["ema_decay"] or 0.0,
        backend.codes[parameter.dtype], *backend.context(parameter.device),
    )  # fmt: skip


def numbers_of(steps: Tensor, group: dict[str, Any], grad_scale: Tensor) -> Tensor:
    """What differs from step to step, computed where the steps [P] are: float64 [P, 4], rows as vit::AdamWCaptured
    takes them."""
    beta1, beta2 = group["betas"]
    lr, t = group["lr"].double(), steps.double()
    rows = [1 - lr * group["weight_decay"], lr / (1 - beta1**t), (1 - beta2**t).sqrt(), grad_scale.double()]
    return torch.stack([row.expand_as(t) for row in rows], dim=1)


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the dtype and with the strides of its parameter."""
    if gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _tensors(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> tuple[int, ...]:
    """The addresses with which both structs begin."""
    packed = "exp_avg_root" in state
    scale, root_scale = (state["exp_avg_scale"], state["exp_avg_root_scale"]) if packed else (None, None)
    table = codes(parameter.device) if packed else None
    averages = (state["exp_avg"], state["exp_avg_root" if packed else "exp_avg_sq"])
    tensors = (parameter, gradient, *averages, scale, root_scale, state.get("ema"), table)
    return tuple(map(_address, tensors))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


_CODES: dict[torch.device, Tensor] = {}


def codes(device: torch.device) -> Tensor:
    """The values of the code of 8 bits with a sign and without: float32 [2, 256]."""
    if device not in _CODES:
        _CODES[device] = torch.stack([code(True), code(False)]).to(device)
    return _CODES[device]


def corrections(state: dict[str, Tensor], group: dict[str, Any]) -> tuple[float, float]:
    """What the averages have to be divided by after so many steps: 1 - beta1^t, 1 - beta2^t."""
    step = float(state["step"])
    return 1 - group["betas"][0] ** step, 1 - group["betas"][1] ** step


def reference(
    parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], grad_scale: float
) -> None:
    """The same step in PyTorch's operations."""
    beta1, beta2 = group["betas"]
    lr, packed = float(group["lr"]), "exp_avg_root" in state
    correction1, correction2 = corrections(state, group)
    if packed:
        m = _unpacked(state, "exp_avg").view(parameter.shape)
        root = _unpacked(state, "exp_avg_root").view(parameter.shape)
        v = root.square_()
    else:
        m, v = state["exp_avg"], state["exp_avg_sq"]
    gradient = gradient.to(m.dtype)
    if grad_scale != 1:
        gradient = gradient * grad_scale
    target = parameter if parameter.dtype == m.dtype else parameter.to(m.dtype)
    target.mul_(1 - lr * group["weight_decay"])
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = v.sqrt()
    spread = (root / math.sqrt(correction2)).add_(group["eps"])
    target.addcdiv_(m, spread, value=-lr / correction1)
    if target is not parameter:
        parameter.copy_(target)
    if packed:
        _pack(state, "exp_avg", m)
        _pack(state, "exp_avg_root", root)
    if "ema" in state:
        state["ema"].lerp_(target.to(state["ema"].dtype), 1 - group["ema_decay"])


def _unpacked(state: dict[str, Tensor], name: str) -> Tensor:
    """The numbers of an average of 8 bits, float32 [n]. There may be more scales than blocks: of a larger part."""
    indices = state[name].view(-1)
    scales = state[f"{name}_scale"].view(-1)[: blocks_of(indices.numel())]
    return dequantize(indices, scales, signed=name == "exp_avg")


def _pack(state: dict[str, Tensor], name: str, values: Tensor) -> None:
    """Puts the numbers into the bytes and scales of an average."""
    indices, scales = quantize(values.reshape(-1), signed=name == "exp_avg")
    state[name].view(-1).copy_(indices)
    state[f"{name}_scale"].view(-1)[: len(scales)].copy_(scales)
