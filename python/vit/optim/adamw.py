"""AdamW, with its averages in float32 or in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import BackendError, NativeBackend, get
from .blockwise import blocks_of
from .launch import kernel_for, launch, launch_captured, numbers_of, reference

STATES = ("float32", "8bit")

#: Smaller parameters (biases, norms, class token) keep float32: they are few, and their precision counts.
MIN_8BIT = 4096


#: Settings of torch.optim.AdamW that say nothing here.
_OF_TORCH = ("amsgrad", "maximize", "foreach", "differentiable", "fused", "decoupled_weight_decay")


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101).

    Of step t, with gradient g:

        p <- (1 - lr weight_decay) p
        m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
        p <- p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    A step is one pass over memory by the backend's kernel, where it has one.

    params: tensors of a floating dtype, or groups of them; the averages are of their shape, float32 for bfloat16 and
    float16 too, float64 for float64
    state: "float32", equal to torch.optim.AdamW to rounding; or "8bit": parameters of 4,096 elements and more keep m
    and sqrt(v) in blocks of 256 numbers with the dynamic code of arXiv:2110.02861, a quarter of the bytes. (The root
    has half of v's decades, so that a small v is not stored as nothing.)
    max_norm: gradients are scaled down, in that pass, to at most this norm of all of them together
    ema_decay: an average of the parameters, a <- decay a + (1 - decay) p, is kept in `optimizer.state[p]["ema"]`
    backend: whose kernel steps: "auto", a backend's name, or "reference" for PyTorch's operations
    capturable: steps may become part of a CUDA graph: the number of the step and lr, a tensor that schedulers write to,
    lie on the GPU and are read at each replay. Parameters on a GPU; take one step before the capture

    Raises ValueError for settings out of range, RuntimeError for sparse gradients and for a step in a capture that its
    replays would repeat with the numbers of the first, TypeError for complex parameters, BackendError when the named
    backend cannot step a parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state: str = "float32",
        max_norm: float | None = None,
        ema_decay: float | None = None,
        backend: str = "auto",
        capturable: bool = False,
    ) -> None:
        self.max_norm, self.backend = max_norm, backend
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ValueError(f"vit: AdamW: max_norm is {max_norm}; it must be a finite number above 0, or None")
        if backend != "auto":
            get(backend)
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state": state}
        super().__init__(params, {**settings, "ema_decay": ema_decay, "capturable": capturable})

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds."""
        return super().__getstate__() | {"max_norm": self.max_norm, "backend": self.backend}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes further parameters, with settings of their own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if group["capturable"] and not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64, device=group["params"][0].device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves every parameter that has a gradient; the value of `closure`, which computes them anew, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for group, parameters in moved:
            self._check_capture(parameters, group)
        scale = self._grad_scale()
        for group, parameters in moved:
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter].update(initial_state(parameter, **_kind(group)))
            if not group["capturable"]:
                for parameter in parameters:
                    self._step(parameter, group, float(scale))
            elif parameters:
                self._step_captured(parameters, group, scale)
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any], grad_scale: float) -> None:
        state = self.state[parameter]
        state["step"] += 1
        mine, gradient = _local(parameter), _local(parameter.grad)  # type: ignore[arg-type]
        local = {name: _local(value) for name, value in state.items()}
        backend = kernel_for(self.backend, mine, "exp_avg_root" in state)
        if backend is None:
            reference(mine, gradient, local, group, grad_scale)
        else:
            launch(backend, mine, gradient, local, group, grad_scale)

    def _step_captured(self, parameters: list[Tensor], group: dict[str, Any], grad_scale: Tensor | float) -> None:
        """Steps that read nothing from the GPU: a dozen small operations for all parameters, then a kernel for each."""
        states = [{n: _local(value) for n, value in self.state[parameter].items()} for parameter in parameters]
        backends = [self._capturable(p, "exp_avg_root" in state) for p, state in zip(parameters, states, strict=True)]
        steps = [self.state[parameter]["step"] for parameter in parameters]
        torch._foreach_add_(steps, 1)
        scale = grad_scale if isinstance(grad_scale, Tensor) else steps[0].new_ones(())
        exact = numbers_of(torch.stack(steps), group, scale)
        rows = {torch.float64: exact, torch.float32: exact.float()}
        for i, (parameter, state, backend) in enumerate(zip(parameters, states, backends, strict=True)):
            numbers = rows[torch.float64 if parameter.dtype == torch.float64 else torch.float32][i]
            launch_captured(backend, _local(parameter), _local(parameter.grad), state, group, numbers)  # type: ignore[arg-type]

    def _capturable(self, parameter: Tensor, packed: bool) -> NativeBackend:
        """The backend whose kernel steps the parameter with numbers that lie on the device."""
        backend = kernel_for(self.backend, _local(parameter), packed, "adamw_captured")
        if backend is None:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise BackendError(
                f"vit: AdamW(capturable=True) steps by a kernel of the cuda backend, and for {dtype} on "
                f"{parameter.device} with backend={self.backend!r} there is none: move the parameters to a GPU, or "
                "leave capturable away"
            )
        return backend

    def _check_capture(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """RuntimeError for a step inside a capture whose replays would repeat what is true of the first alone."""
        if not (parameters and _capturing(parameters[0].device)):
            return
        if not group["capturable"]:
            why = "lr and the number of the step would stay what they are now; use AdamW(..., capturable=True)"
        elif not isinstance(group["lr"], Tensor) or group["lr"].device != parameters[0].device:
            why = (
                "lr is a number of the CPU and would stay what it is now; write to the tensor: group['lr'].fill_(value)"
            )
        elif not all(self.state[parameter] for parameter in parameters):
            why = "the averages would be made, and so be zero, in each; take one step before the capture"
        else:
            return
        raise RuntimeError(f"vit: a step of AdamW is captured into a CUDA graph, in whose replays {why}")

    def _grad_scale(self) -> Tensor | float:
        """What brings the gradients, which must be dense, to max_norm; a tensor where nothing may be read from a
        GPU."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            raise RuntimeError("vit: AdamW takes no sparse gradients")
        if self.max_norm is None or not gradients:
            return 1.0
        norm = nn.utils.get_total_norm(gradients)
        norm = getattr(norm, "full_tensor", lambda: norm)()
        if any(group["capturable"] for group in self.param_groups):
            scale = self.max_norm / (norm.double() + 1e-6)
            return torch.where(scale < 1, scale, 1.0)
        return min(1.0, self.max_norm / (float(norm) + 1e-6))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of another optimizer over the same parameters, torch.optim.AdamW's among them; ValueError
        when one does not fit.

        What the state is kept in (float32, 8bit) comes with it, as lr and the other settings do.
        """
        # torch.optim casts the state to the parameter's dtype: bytes to float32, float32 to bfloat16.
        given = state_dict["state"]
        for number, group in enumerate(state_dict["param_groups"]):
            _check_origin(number, group)
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # of torch, or of a version without it
            for name in _OF_TORCH:
                group.pop(name, None)
            group.setdefault("state", "float32")
            group.setdefault("ema_decay", None)
            group.setdefault("capturable", False)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        kinds = [_kind(group) for group in self.param_groups for _ in group["params"]]
        # Numbers, or of torch.distributed.checkpoint the parameters' names.
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for index, (key, parameter) in enumerate(zip(keys, parameters, strict=True)):
            if key not in given:
                continue
            expected = initial_state(parameter, **kinds[index])
            for name, like in expected.items():
                value = given[key].get(name)
                if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
                    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else value
                    raise ValueError(
                        f"vit: the state of parameter {index} does not fit AdamW(state={kinds[index]['state']!r}): "
                        f"{name} is {found}, not {like.dtype} {list(like.shape)}"
                    )
            self.state[parameter] = {name: given[key][name].to(expected[name].device, copy=True) for name in expected}


def _check_origin(number: int, group: dict[str, Any]) -> None:
    """ValueError for the settings of an optimizer whose steps are others than AdamW's."""
    where = f"vit: AdamW cannot go on with this state: its group {number} has"
    if missing := [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]:
        raise ValueError(f"{where} no {', '.join(missing)}, so it is of another optimizer; begin without it")
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{where} {name}=True, which this AdamW does not have; go on with torch.optim.AdamW")
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        raise ValueError(
            f"{where} Adam's weight_decay {group['weight_decay']} in the gradient; go on with torch.optim.Adam"
        )


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is spread over several (FSDP2's DTensor)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _capturing(device: torch.device) -> bool:
    """Whether what is asked of the device becomes part of a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _kind(group: dict[str, Any]) -> dict[str, Any]:
    """What the form of a state follows from."""
    averaged = group["ema_decay"] is not None
    return {"state": group["state"], "averaged": averaged, "capturable": group["capturable"]}


def _zeros_8bit(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """An average of 8 bits: its bytes [n], and the scales of its blocks [n / 256].

    Of a DTensor the blocks are those of each process's part. Both are DTensors, too, so that checkpoints hold what each
    process has: the bytes of the parameter's shape, the scales [parts, blocks of the largest part].
    """
    device = parameter.device
    if not hasattr(parameter, "device_mesh"):
        count = parameter.numel()
        return torch.zeros(count, dtype=torch.uint8, device=device), torch.zeros(blocks_of(count), device=device)
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import zeros as spread

    mesh, sizes, parts = parameter.device_mesh, list(parameter.shape), 1
    for place, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
        if placement.is_shard():
            parts *= mesh.size(place)
            sizes[placement.dim] = -(-sizes[placement.dim] // mesh.size(place))
    ways = [Shard(0) if one.is_shard() else Replicate() for one in parameter.placements]  # type: ignore[attr-defined]
    scales = spread(parts, blocks_of(math.prod(sizes)), device_mesh=mesh, placements=ways)
    return torch.zeros_like(parameter, dtype=torch.uint8), scales


def initial_state(parameter: Tensor, state: str, averaged: bool = False, capturable: bool = False) -> dict[str, Tensor]:
    """The state of a parameter before its first step."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device if capturable else "cpu")
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    ema = {"ema": parameter.detach().to(dtype, copy=True)} if averaged else {}
    if state == "8bit" and parameter.numel() >= MIN_8BIT:
        names = ("exp_avg", "exp_avg_root")
        zeros = {name: _zeros_8bit(parameter) for name in names}
        bytes_, scales = {n: pair[0] for n, pair in zeros.items()}, {f"{n}_scale": pair[1] for n, pair in zeros.items()}
        return {"step": step, **bytes_, **scales, **ema}
    return {
        "step": step,
        **{
            name: torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
            for name in ("exp_avg", "exp_avg_sq")
        },
        **ema,
    }


def _check(group: dict[str, Any]) -> None:
    for name, low, high in (("lr", 0.0, math.inf), ("eps", 0.0, math.inf), ("weight_decay", 0.0, math.inf)):
        if not low <= float(group[name]) < high:
            raise ValueError(f"vit: AdamW: {name} is {group[name]}; it must be a finite number from {low:g}")
    if (decay := group["ema_decay"]) is not None and not 0 <= decay < 1:
        raise ValueError(f"vit: AdamW: ema_decay is {decay}; it must be a number from 0 and below 1, or None")
    betas = group["betas"]
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"vit: AdamW: betas are {betas}; two numbers from 0 and below 1 are needed")
    if group["state"] not in STATES:
        raise ValueError(f"vit: AdamW: state is {group['state']!r}; allowed are {', '.join(STATES)}")
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise TypeError(f"vit: AdamW takes floating-point parameters, not {parameter.dtype}")
