"""Derivatives of several gradients at once, and the transforms of torch.func."""

from __future__ import annotations

import draw
import pytest
import torch
import vit
from test_ops import call, small
from torch import Tensor
from vit.ops import OPS
from vit.ops.movement import Movement, of


def batched(y: Tensor, inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """The gradients for each of dy [3, *y.shape] in one call, and by torch.vmap the same."""
    at_once = torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda one: torch.autograd.grad(y, inputs, one, retain_graph=True))(dy)
    for a, b in zip(at_once, mapped, strict=True):
        assert torch.equal(a, b)
    return at_once


def one_by_one(y: Tensor, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    each = [torch.autograd.grad(y, inputs, one, retain_graph=True) for one in dy]
    return [torch.stack(grads) for grads in zip(*each, strict=True)]


@pytest.mark.parametrize("op", OPS)
def test_batched_gradients_are_those_of_each(backend, device, op):
    tensors, options = small(op, device=device, grad=True)
    y = call(op, backend, tensors, options)
    dy = draw.randn(3, *y.shape, device=device)
    inputs = list(tensors.values())
    for got, want in zip(batched(y, inputs, dy), one_by_one(y, inputs, dy), strict=True):
        assert torch.equal(got, want)


def join_and_split(m: Movement, x: Tensor) -> Tensor:
    first, second = m.split(x[:1], [2, 3])
    return m.join([second * 2, first])


MOVEMENTS = {
    "contiguous": lambda m, x: m.contiguous(x.transpose(1, 2)),
    "fork": lambda m, x: (lambda a, b: 2 * a + b)(*m.fork(x)),
    "unpack": lambda m, x: sum(i * t for i, t in enumerate(m.unpack(x.view(2, 5, 3, 2, 2)), start=1)),
    "tokens": lambda m, x: m.tokens(x[:, 1:], x[:1, :1], 3 * x[:1]),
    "first": lambda m, x: m.first(x, 2),
    "join, split": join_and_split,
    "mean": lambda m, x: m.mean(x, 1),
}


@pytest.mark.parametrize("name", MOVEMENTS)
def test_batched_gradients_pass_through_movement(backend, device, name):
    x = draw.randn(2, 5, 12, device=device, requires_grad=True)
    y = MOVEMENTS[name](of(backend), x)
    reference = MOVEMENTS[name](of("reference"), x)
    dy = draw.randn(3, *y.shape, device=device)
    torch.testing.assert_close(batched(y, [x], dy), tuple(one_by_one(reference, [x], dy)))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_vectorized_jacobian_of_a_model(backend, device, pool):
    small_model = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = vit.create("vit_tiny_patch16_224", backend=backend, device=device, global_pool=pool, **small_model)
    draw.fill(model, 0.2)
    x = draw.randn(2, 3, 32, 32, device=device)
    vectorized = torch.autograd.functional.jacobian(model, x, vectorize=True)
    torch.testing.assert_close(vectorized, torch.autograd.functional.jacobian(model, x))
