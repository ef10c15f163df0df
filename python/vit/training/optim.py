"""Parameter groups, the learning rate of a step, and the running average of the weights."""

from __future__ import annotations

import copy
import math
from functools import partial

import torch
from torch import Tensor, nn

from ..model import VisionTransformer
from ..optim import AdamW
from ..optim.adamw import initial_state
from ..support.extras import require
from .sharded import whole


def make_optimizer(
    model: VisionTransformer,
    lr: float,
    weight_decay: float,
    beta2: float,
    layer_decay: float = 1.0,
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """The optimizer of --optimizer; biases, norms and what model.no_weight_decay() names are not decayed.

    layer_decay: the learning rate of a block as a share of that of the block above (arXiv:2106.08254); a group's
    "lr_scale" is its layer's share of the whole rate, which the head has
    kind: "adamw" (arXiv:1711.05101), "adamw8bit" for averages of 8 bits (vit.optim), "sgd" with Nesterov's momentum of
        0.9, and timm's "lion" (arXiv:2302.06675) and "lamb" (arXiv:1904.00962)
    """
    kept = set(model.no_weight_decay())
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** (len(model.blocks) + 1 - layer_of(name, len(model.blocks)))
            groups.setdefault((scale, parameter.ndim > 1 and name not in kept), []).append(parameter)
    described = [
        {"params": found, "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        for (scale, decayed), found in groups.items()
    ]
    if kind == "adamw8bit":
        return AdamW(described, lr=lr, betas=(0.9, beta2), state="8bit")
    if kind == "sgd":
        return torch.optim.SGD(described, lr=lr, momentum=0.9, nesterov=True)
    if kind in ("lion", "lamb"):
        timm = require("timm.optim", "optim")
        # Gradients are clipped already, by --clip.
        make = timm.Lion if kind == "lion" else partial(timm.Lamb, max_grad_norm=None)
        made: torch.optim.Optimizer = make(described, lr=lr, betas=(0.9, beta2))
        return made
    # One fused kernel over all parameters: small models spend more time in the launches than in the
    # arithmetic.
    return torch.optim.AdamW(described, lr=lr, betas=(0.9, beta2), fused=True)


def layer_of(name: str, depth: int) -> int:
    """0 for what stands before the blocks, 1 to depth for a block, depth + 1 for what comes after."""
    first, _, rest = name.partition(".")
    if first == "blocks":
        return int(rest.partition(".")[0]) + 1
    return 0 if first in ("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed", "norm_pre") else depth + 1


def expected_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The tensors, by name, that the optimizer keeps of a parameter once it has moved."""
    if isinstance(optimizer, AdamW):
        return initial_state(parameter, "8bit")
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer": parameter}
    if type(optimizer).__name__ == "Lion":
        return {"exp_avg": parameter}
    if type(optimizer).__name__ == "Lamb":
        return {"exp_avg": parameter, "exp_avg_sq": parameter}
    return {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros((), device="cpu")}


def counted(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The number of steps of each group, for optimizers that count there and not beside each parameter."""
    groups = optimizer.param_groups
    return {str(i): torch.as_tensor(group["step"]).float() for i, group in enumerate(groups) if "step" in group}


def learning_rate(step: int, total: int, warmup: int, peak: float, low: float) -> float:
    """Linear from peak / warmup at step 0 to peak, then half a cosine that would reach `low` at step
    `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def used_decay(decay: float, step: int) -> float:
    """The decay of the average at optimizer step `step` (counted from 1): min(decay, (1 + t) / (10 + t)), so that the
    random start is soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


class Average:
    """An exponential moving average of a model's weights: average += (1 - decay) (weights - average). The decay of step
    t is used_decay(decay, t), which is smaller at first.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average after optimizer step `step` (counted from 1)."""
        weight = 1.0 - used_decay(self.decay, step)
        torch._foreach_lerp_(list(self.model.parameters()), [whole(p) for p in model.parameters()], weight)
