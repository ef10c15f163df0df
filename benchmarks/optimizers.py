"""AdamW over the parameters of ViT-B/16, time and state: python benchmarks/optimizers.py [--json FILE]

vit.optim.AdamW with averages in float32 and in 8 bits, PyTorch's fused AdamW and, where bitsandbytes is installed, its
AdamW8bit; each in a process of its own, in one race (vit.bench.workers). Gradients are random numbers.

Then the loss after 400 steps of vit_digits on the digits of scikit-learn, from the same weights and batches.
"""

from __future__ import annotations

import importlib.util

import torch
import vit
from script import Records, raced, run
from torch import Tensor, nn
from vit.bench.workers import Candidate
from vit.support.random import normal

KINDS = ["float32", "8bit", "torch fused"]
if importlib.util.find_spec("bitsandbytes"):
    KINDS.append("bitsandbytes 8bit")


def make(kind: str, parameters: list[nn.Parameter], lr: float = 1e-3) -> torch.optim.Optimizer:
    if kind == "torch fused":
        return torch.optim.AdamW(parameters, lr=lr, fused=True)
    if kind == "bitsandbytes 8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=lr)
    return vit.optim.AdamW(parameters, lr=lr, state=kind)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors of the state with more than one number; tables that parameters share count once."""
    tensors = {
        value.data_ptr(): value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel() > 1
    }
    return sum(tensors.values())


def candidate(kind: str) -> Candidate:
    """One step of all parameters."""
    model = vit.create("vit_base_patch16_224", backend="reference")
    parameters = list(model.parameters())
    for i, parameter in enumerate(parameters):
        parameter.grad = normal(tuple(parameter.shape), "gradient", i) * 1e-3
    optimizer = make(kind, parameters)
    return Candidate(optimizer.step, result=lambda _: state_bytes(optimizer))


def loss_after(kind: str, seeds: int = 4, steps: int = 400) -> float:
    """The mean loss of the last 20 steps, and of models of some seeds, as one alone moves by a third."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float()[:, None] / 8 - 1, torch.from_numpy(digits.target)
    losses = []
    for seed in range(seeds):
        torch.manual_seed(seed)  # the weights' key
        model = vit.create("vit_digits", backend="cpu")
        optimizer = make(kind, list(model.parameters()))
        for step in range(steps):
            batch = torch.arange(64 * step, 64 * step + 64) % len(labels)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses += [loss.item()] if step >= steps - 20 else []
    return sum(losses) / len(losses)


def measure(rounds: int) -> Records:
    """A record per optimizer."""
    records = []
    for kind, (times, size) in zip(KINDS, raced(candidate, [(kind,) for kind in KINDS], rounds), strict=True):
        record = {"optimizer": kind, **times, "state_bytes": size, "loss": loss_after(kind)}
        records.append(record)
        print(
            f"{kind:18s} {record['ms_median']:7.1f} ms  {size / 2**20:6.1f} MiB  loss {record['loss']:.4f}", flush=True
        )
    return records


if __name__ == "__main__":
    run(__doc__, measure)
