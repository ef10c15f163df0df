"""Every named model against timm: `python -m tests.zoo_against_timm [PATTERN] [--backend cpu] [--depth 2]`.

Random weights, the published width, depth cut to 2, six patches that form no square. State dicts are exchanged
strictly in both directions; logits must agree within 1e-5 of the largest, input gradients within 2e-4, in float32.
Prints one line for each name that differs, and how many of each tier agree; the exit code is 1 if one does not.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

import timm
import torch
import vit
from vit.model.configs import CONFIGS
from vit.support.random import normal

#: Of the largest value: float32 rounding of two blocks, summed in another order.
LOGITS, GRADIENT = 1e-5, 2e-4


def compare(name: str, backend: str, **arch: Any) -> str | None:
    """How a named model differs from timm's; None where it does not."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, **arch).eval()
    fill(theirs)
    ours = vit.create(name, backend=backend, device="cpu", weight_init="skip", **arch).eval()
    state = theirs.state_dict()
    if list(ours.state_dict()) != list(state):
        return f"other parameters: {sorted(set(state) ^ set(ours.state_dict()))[:6]}"
    ours.load_state_dict(state)
    x = normal((2, 3, *ours.patch_embed.img_size), "images")
    got, gradient = _run(ours, x)
    del state
    theirs.load_state_dict(ours.state_dict())
    wanted, true_gradient = _run(theirs, x)
    for what, a, b, bound in (("logits", got, wanted, LOGITS), ("gradient", gradient, true_gradient, GRADIENT)):
        error = float((a - b).abs().max() / b.abs().max())
        if a.shape != b.shape or not error <= bound:
            return f"{what} differ by {error:.2g} of the largest, allowed {bound:g}"
    return None


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Random parameters, none at zero or one, where mistakes hide: windows of one long row of numbers (drawing all of
    them would take most of the time), at places that no two parameters share."""
    for i, (key, parameter) in enumerate(model.named_parameters()):
        begin = 7919 * i % len(_NUMBERS)
        repeats = (begin + parameter.numel()) // len(_NUMBERS) + 1
        drawn = _NUMBERS.repeat(repeats)[begin : begin + parameter.numel()].view(parameter.shape) * 0.05
        parameter.copy_(drawn if parameter.ndim > 1 or "bias" in key else parameter + drawn)


_NUMBERS = normal((1_000_003,), "parameters")  # a prime: rows of a weight begin at different places


def _run(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (y * normal(tuple(y.shape), "weights of the loss")).sum().backward()
    model.zero_grad()
    return y.detach(), x.grad


def small(name: str, depth: int = 2) -> dict[str, Any]:
    """Arguments that cut a named model to a few seconds, on a grid that is no square."""
    patch = CONFIGS[name].arch["patch_size"]
    return {"depth": depth, "img_size": (2 * patch, 3 * patch), "num_classes": 5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--depth", type=int, default=2)
    args = parser.parse_args()
    agree = {1: 0, 2: 0}
    names = [name for name in vit.list_models(args.pattern) if timm.is_model(name)]
    for name in names:
        difference = compare(name, args.backend, **small(name, args.depth))
        agree[tier(name)] += difference is None
        if difference:
            print(f"{name}: {difference}", flush=True)
    for number, count in agree.items():
        asked = sum(tier(name) == number for name in names)
        print(f"tier {number}: {count} of {asked} names agree with timm {timm.__version__} on {args.backend}")
    return int(sum(agree.values()) < len(names))


def tier(name: str) -> int:
    """1 for the families that are used most, 2 for the others."""
    return 1 if re.match(_MOST_USED, name) else 2


_MOST_USED = (
    r"(vit_(tiny|small|base|large|huge)_patch\d+_(224|384)|vit_giant_patch14_224|deit.*|flexivit.*|.*dinov[23].*|"
    r"vit_(base|large|huge|giant|gigantic)_patch\d+_(plus_)?clip_.*|.*siglip.*|"
    r"eva02_(tiny|small|base|large)_patch14_\d+)$"
)


if __name__ == "__main__":
    sys.exit(main())
