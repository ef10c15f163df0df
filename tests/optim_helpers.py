"""What a kernel of AdamW has to do: shared by the tests of the backends and of the emulated GPUs."""

from __future__ import annotations

import draw
import torch
from torch import Tensor, nn
from vit.optim import AdamW
from vit.optim.blockwise import BLOCK, code, quantize

SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}

#: The dtypes and states that every kernel takes.
KINDS = [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.float64, "float32")]
KINDS += [(torch.float32, "8bit"), (torch.bfloat16, "8bit")]


def check_code(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """With betas of 0 the averages are the gradient and its magnitude: numbers of all sizes, and all near the edges."""
    edges = torch.cat([(code(s)[:-1] + code(s)[1:]) / 2 for s in (True, False)])
    near = torch.cat([torch.nextafter(edges, torch.tensor(towards)) for towards in (-2.0, 2.0)])
    spread = torch.arange(0, 0x3F800000, 49999, dtype=torch.int32).view(torch.float32)
    values = torch.cat([edges, near, spread, -spread, torch.tensor([0.0, -0.0, 1.0, -1.0])])
    blocks = nn.functional.pad(values, (0, -len(values) % (BLOCK - 1))).view(-1, BLOCK - 1)
    # The largest value of each block is 1.
    gradient = nn.functional.pad(blocks, (0, 1), value=1.0).view(-1).to(device, dtype)
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient
    optimizer = AdamW([parameter], lr=0, betas=(0.0, 0.0), state="8bit", backend=backend)
    optimizer.step()
    state = optimizer.state[parameter]
    roots = gradient.float().square().sqrt()
    for name, (indices, scales) in {
        "exp_avg": quantize(gradient.float(), signed=True),
        "exp_avg_root": quantize(roots, signed=False),
    }.items():
        assert torch.equal(state[name], indices)
        assert torch.equal(state[f"{name}_scale"], scales)


def one_more_step(
    backend: str, device: torch.device, dtype: torch.dtype, state: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """A parameter and its state after a step of the reference and one of `backend`, with all that a step can do."""
    draw.restart("steps")
    parameter = nn.Parameter(draw.randn(5000).to(device, dtype))
    optimizer = AdamW([parameter], **SETTINGS, state=state, max_norm=30.0, ema_decay=0.9, backend="reference")
    for name in ("reference", backend):
        parameter.grad = draw.randn(5000).to(device, dtype)
        optimizer.backend = name
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def check_step(backend: str, device: torch.device, dtype: torch.dtype, state: str) -> None:
    """A step has 8 operations one after the other, of which a kernel may fuse some: as many roundings. An average close
    to the middle of two values of the code may become either."""
    ours, kept = one_more_step(backend, device, dtype, state)
    theirs, expected = one_more_step("reference", device, dtype, state)
    assert kept.keys() == expected.keys()
    for found, wanted in [(ours, theirs), *((kept[name], expected[name]) for name in expected)]:
        if wanted.dtype == torch.uint8:
            apart = (found.int() - wanted.int()).abs()
            assert apart.max() <= 1
            assert apart.count_nonzero() <= 5
        else:
            bound = 8 * torch.finfo(wanted.dtype).eps
            torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)
