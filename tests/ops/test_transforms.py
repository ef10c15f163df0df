"""Derivatives of several gradients at once, and the transforms of torch.func."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import draw
import pytest
import timm
import torch
import vit
from rounding import close
from test_ops import call, small
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from vit.backends import BackendError
from vit.ops import OPS
from vit.ops.movement import Movement, of

SMALL_MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
NAME = "vit_tiny_patch16_224"


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
    close(batched(y, [x], dy), tuple(one_by_one(reference, [x], dy)))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_vectorized_jacobian_of_a_model(backend, device, pool):
    model = vit.create(NAME, backend=backend, device=device, global_pool=pool, **SMALL_MODEL)
    draw.fill(model, 0.2)
    x = draw.randn(2, 3, 32, 32, device=device)
    vectorized = torch.autograd.functional.jacobian(model, x, vectorize=True)
    assert torch.equal(vectorized, torch.autograd.functional.jacobian(model, x))


def f_of(op: str, backend: str, tensors: dict[str, Tensor], options: dict) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The op as a function of its first tensor, and a value for it."""
    first = next(iter(tensors))
    return lambda x: call(op, backend, tensors | {first: x}, options), tensors[first]


FUNC = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(lambda z: f(z).sum())(y).square().sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("transform", FUNC)
@pytest.mark.parametrize("op", OPS)
def test_auto_is_the_reference_under_a_transform(op, transform):
    tensors, options = small(op)
    with sdpa_kernel(SDPBackend.MATH):
        want = FUNC[transform](*f_of(op, "reference", tensors, options))
        assert torch.equal(FUNC[transform](*f_of(op, "auto", tensors, options)), want)


def per_sample_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return list(torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x).values())


def one_parameter(model: nn.Module, x: Tensor) -> Tensor:
    name = "blocks.0.mlp.fc1.weight"
    loss = torch.func.grad(lambda w: torch.func.functional_call(model, {name: w}, (x,)).square().sum())
    return loss(model.get_parameter(name).detach())


def ensemble(model: nn.Module, x: Tensor) -> Tensor:
    parameters, buffers = torch.func.stack_module_state([model, copy.deepcopy(model)])
    one = lambda p, b, y: torch.func.functional_call(model, (p, b), (y,))  # noqa: E731
    return torch.vmap(one, in_dims=(0, 0, None))(parameters, buffers, x)


MODEL = {
    "functional_call, grad": one_parameter,
    "grad": lambda m, x: torch.func.grad(lambda y: m(y).square().sum())(x),
    "jacrev": lambda m, x: torch.func.jacrev(lambda y: m(y[None])[0])(x[0]),
    "vmap": lambda m, x: torch.vmap(lambda y: m(y[None])[0])(x),
    "per-sample gradients": per_sample_gradients,
    "ensemble": ensemble,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap over PyTorch's attention
@pytest.mark.parametrize("transform", MODEL)
def test_a_model_on_auto_under_a_transform_gives_what_timm_gives(transform):
    theirs = draw.fill(timm.create_model(NAME, **SMALL_MODEL), 0.2)
    ours = vit.create(NAME, device="cpu", **SMALL_MODEL)
    ours.load_state_dict(theirs.state_dict())
    x = draw.randn(2, 3, 32, 32)
    want = MODEL[transform](theirs, x)
    for model in (ours, pickle.loads(pickle.dumps(ours))):
        close(MODEL[transform](model, x), want)


@pytest.mark.parametrize("transform", MODEL)
def test_a_model_on_a_named_backend_refuses_transforms(backend, device, transform):
    model = vit.create(NAME, backend=backend, device=device, **SMALL_MODEL)
    with pytest.raises(BackendError, match='backend="reference"'):
        MODEL[transform](model, draw.randn(2, 3, 32, 32, device=device))
