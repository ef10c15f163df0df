"""Parameters, gradients and optimizer state spread over the processes: torch's fully_shard (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model import VisionTransformer


def shard(model: VisionTransformer, optimizer: torch.optim.Optimizer) -> None:
    """Gives each process its share of every parameter and of its state in the optimizer, which then holds the new
    parameters. The parameters of a block are gathered when it computes; those around the blocks stay for the step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    mesh = init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    new = dict(model.named_parameters())
    states = dict(optimizer.state)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for place, old in enumerate(group["params"]):
            parameter = group["params"][place] = new[names[id(old)]]
            if old in states:
                optimizer.state[parameter] = {key: _like(parameter, value) for key, value in states[old].items()}


def _like(parameter: Any, value: Tensor) -> Tensor:
    """A tensor of the parameter's whole shape, spread like it; the number of steps stays as it is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements) if value.dim() else value


def whole(tensor: Tensor) -> Tensor:
    """The tensor, of its parts in all processes, which must all ask for it; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same of each of the tensors."""
    return {name: whole(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def copy_into(target: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Puts the whole parameters into a model of the same parameters that is not sharded."""
    for mine, other in zip(target.parameters(), parameters, strict=True):
        mine.copy_(whole(other))


#: What backends of torch.distributed say when a peer is gone: there is no class of errors for it before torch 2.7, and
#: gloo's are plain RuntimeErrors still.
_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "socket", "processgroup")


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the training does not answer any more."""
    kind = getattr(torch.distributed, "DistError", ())
    text = str(error).lower()
    return isinstance(error, kind) or (isinstance(error, RuntimeError) and any(words in text for words in _LOST))
