"""AdamW, with its averages in float32 or in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .blockwise import blocks_of, dequantize, quantize

STATES = ("float32", "8bit")

#: Smaller parameters (biases, norms, class token) keep float32: they are few, and their precision counts.
MIN_8BIT = 4096


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101).

    Of step t, with gradient g:

        p <- (1 - lr weight_decay) p
        m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
        p <- p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    params: tensors of a floating dtype, or groups of them; the averages are of their shape, float32 for bfloat16 and
    float16 too, float64 for float64
    state: "float32", equal to torch.optim.AdamW to rounding; or "8bit": parameters of 4,096 elements and more keep m
    and sqrt(v) in blocks of 256 numbers with the dynamic code of arXiv:2110.02861, a quarter of the bytes. (The root
    has half of v's decades, so that a small v is not stored as nothing.)

    Raises ValueError for settings out of range, RuntimeError for sparse gradients, TypeError for complex parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state: str = "float32",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state": state})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes further parameters, with settings of their own."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves every parameter that has a gradient; the value of `closure`, which computes them anew, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError("vit: AdamW takes no sparse gradients")
                if not self.state[parameter]:
                    self.state[parameter].update(initial_state(parameter, group["state"]))
                _update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of another optimizer over the same parameters; ValueError when one does not fit.

        What the state is kept in (float32, 8bit) comes with it, as lr and the other settings do.
        """
        # torch.optim casts the state to the parameter's dtype: bytes to float32, float32 to bfloat16.
        given = state_dict["state"]
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        kinds = [group["state"] for group in self.param_groups for _ in group["params"]]
        for index, parameter in enumerate(parameters):
            if index not in given:
                continue
            expected = initial_state(parameter, kinds[index])
            for name, like in expected.items():
                value = given[index].get(name)
                if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
                    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else value
                    raise ValueError(
                        f"vit: the state of parameter {index} does not fit AdamW(state={kinds[index]!r}): {name} is "
                        f"{found}, not {like.dtype} {list(like.shape)}"
                    )
            self.state[parameter] = {name: given[index][name].to(expected[name].device, copy=True) for name in expected}


def initial_state(parameter: Tensor, state: str) -> dict[str, Tensor]:
    """The state of a parameter before its first step."""
    step = torch.zeros((), dtype=torch.float32)
    if state == "8bit" and parameter.numel() >= MIN_8BIT:
        count, device = parameter.numel(), parameter.device
        names = ("exp_avg", "exp_avg_root")
        bytes_, scales = (
            {name: torch.zeros(count, dtype=torch.uint8, device=device) for name in names},
            {f"{name}_scale": torch.zeros(blocks_of(count), device=device) for name in names},
        )
        return {"step": step, **bytes_, **scales}
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return {
        "step": step,
        **{
            name: torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
            for name in ("exp_avg", "exp_avg_sq")
        },
    }


def _update(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    state["step"] += 1
    step, lr = float(state["step"]), float(group["lr"])
    packed = "exp_avg_root" in state
    if packed:
        m = dequantize(state["exp_avg"], state["exp_avg_scale"], signed=True).view(parameter.shape)
        root = dequantize(state["exp_avg_root"], state["exp_avg_root_scale"], signed=False).view(parameter.shape)
        v = root.square_()
    else:
        m, v = state["exp_avg"], state["exp_avg_sq"]
    gradient = gradient.to(m.dtype)
    target = parameter if parameter.dtype == m.dtype else parameter.to(m.dtype)
    target.mul_(1 - lr * group["weight_decay"])
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = v.sqrt()
    spread = (root / math.sqrt(1 - beta2**step)).add_(group["eps"])
    target.addcdiv_(m, spread, value=-lr / (1 - beta1**step))
    if target is not parameter:
        parameter.copy_(target)
    if packed:
        state["exp_avg"], state["exp_avg_scale"] = quantize(m.reshape(-1), signed=True)
        state["exp_avg_root"], state["exp_avg_root_scale"] = quantize(root.reshape(-1), signed=False)


def _check(group: dict[str, Any]) -> None:
    for name, low, high in (("lr", 0.0, math.inf), ("eps", 0.0, math.inf), ("weight_decay", 0.0, math.inf)):
        if not low <= float(group[name]) < high:
            raise ValueError(f"vit: AdamW: {name} is {group[name]}; it must be a finite number from {low:g}")
    betas = group["betas"]
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"vit: AdamW: betas are {betas}; two numbers from 0 and below 1 are needed")
    if group["state"] not in STATES:
        raise ValueError(f"vit: AdamW: state is {group['state']!r}; allowed are {', '.join(STATES)}")
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise TypeError(f"vit: AdamW takes floating-point parameters, not {parameter.dtype}")
