"""Calls that were made before (ops/repeat.py): bits of a launched call, and launched wherever something looks on."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import draw
import pytest
import torch
import vit
from conftest import NATIVE
from test_memory import same_bits
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from vit.ops import ALL, OPS
from vit.ops.bound import BoundOp, bind
from vit.parity import cases
from vit.parity.problems import DEFINITIONS, build


@pytest.fixture
def repeating(backend: str) -> str:
    if not NATIVE[backend].repeats_below or not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("no call is repeated here")
    return backend


def again(op: BoundOp, *args: Any) -> Any:
    """What the memory of former calls has for a call."""
    return op.repeats[0](args, op.record.scratch(torch.device("cpu")))


def launched(op: BoundOp, *args: Any) -> Tensor:
    """The call by its launcher: arguments with names are never repeated."""
    return op(**dict(zip(inspect.signature(op.op.reference).parameters, args, strict=False)))


def positional(op: BoundOp, calls: list[tuple[Any, ...]]) -> Any:
    """The op, which writes down its arguments in order."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(op.op.reference).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(bound.args)
        return launched(op, *bound.args)

    return call


@pytest.mark.parametrize("name", OPS)
def test_a_repeated_call_has_the_bits_of_a_launched_one(repeating, name):
    op, repeated = bind(ALL[name], repeating), 0
    listed = cases(ops=[name], groups=["odd", "corner"], dtypes=["float32", "bfloat16"], directions=["fwd"])
    for case in listed:
        if case.param_dtype and op.op.autocasts:
            continue  # a call under autocast
        calls: list[tuple[Any, ...]] = []
        with torch.no_grad():
            DEFINITIONS[name].call(SimpleNamespace(**{name: positional(op, calls)}), case, build(case).tensors)
            for args in calls:
                op(*args)
                y = again(op, *args)
                assert y is not None, case.id
                repeated += y is not False
                got = op(*args) if y is False else y
                assert same_bits(got, launched(op, *args)), case.id
                assert got.is_contiguous()
                assert got.requires_grad is False
    assert repeated > 0


@pytest.fixture
def linear(repeating: str) -> tuple[BoundOp, list[Tensor]]:
    """A product of sizes no other test has, launched once."""
    op = bind(ALL["linear"], repeating)
    tensors = [draw.randn(3, 7), draw.randn(5, 7), draw.randn(5)]
    with torch.no_grad():
        op(*tensors)
        assert type(again(op, *tensors)) is Tensor
    return op, tensors


def test_it_reads_the_memory_of_now(linear):
    op, (x, w, b) = linear
    first = op(x, w, b)
    w.mul_(2)
    b.data = draw.randn(5)
    second = op(x, w, b)
    assert same_bits(second, launched(op, x, w, b))
    assert not second.equal(first)
    assert first.data_ptr() != second.data_ptr()
    assert type(again(op, x, w, nn.Parameter(b, requires_grad=False))) is not Tensor  # another kind, launched first


def test_another_layout_of_the_same_sizes_is_another_call(linear):
    op, (x, w, b) = linear
    turned = x.t().contiguous().t()
    padded = draw.randn(3, 9)[:, :7]
    for other in (turned, padded):
        assert again(op, other, w, b) is None
        for _ in range(2):
            assert same_bits(op(other, w, b), op(other.contiguous(), w, b))
    assert again(op, turned, w, b) is False  # the launcher makes a copy
    assert type(again(op, padded, w, b)) is Tensor
    w.data = draw.randn(7, 5).t()  # the same object, sizes and dtype
    assert again(op, x, w, b) is None
    assert same_bits(op(x, w, b), op(x, w.contiguous(), b))


def test_shared_memory_is_not_taken_for_a_pattern(repeating):
    """Of matmul(a, a) no pointer says which argument it was."""
    op = bind(ALL["matmul"], repeating)
    a, other = draw.randn(6, 6), draw.randn(6, 6) + 1
    for b in (a, a, other):
        assert same_bits(op(a, b), launched(op, a, b))
    attention = bind(ALL["attention"], repeating)
    x, y, z = (draw.randn(1, 3, 2, 5) + i for i in range(3))
    for q, k, v in ((x, x, x), (x, x, x), (x, y, z), (x, y, z), (x, x, z)):
        assert same_bits(attention(q, k, v), launched(attention, q, k, v))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # forward_ad.make_dual's own
def test_what_looks_on_sees_a_launch(linear):
    op, (x, w, b) = linear
    with Seen() as seen:
        assert again(op, x, w, b) is False
        op(x, w, b)
    assert any("linear_fwd" in name for name in seen.names)
    with torch.autocast("cpu", torch.bfloat16):
        assert op(x, w, b).dtype == torch.bfloat16
    leaf = w.clone().requires_grad_()
    assert again(op, x, leaf, b) is False
    assert op(x, leaf, b).requires_grad
    with torch.no_grad():
        op(x, leaf, b)
        assert type(again(op, x, leaf, b)) is Tensor
    with pytest.raises(vit.BackendError, match=r"torch\.func"):
        torch.func.vmap(lambda row: op(row, w, b))(x)
    with forward_ad.dual_level(), pytest.raises(vit.BackendError, match="forward-mode"):
        op(forward_ad.make_dual(x, x), w, b)
    with pytest.raises(vit.BackendError, match="meta"):
        op(x.to("meta"), w.to("meta"), b.to("meta"))


def test_negative_views_and_subclasses_are_launched(linear):
    op, (x, w, b) = linear
    for negative in (torch.complex(x, x + 1).conj().imag, torch._neg_view(x)):
        assert negative.is_neg()
        for _ in range(3):
            assert same_bits(op(negative, w, b), op(negative.resolve_neg().contiguous(), w, b))

    class Sub(Tensor):
        pass

    for _ in range(3):
        assert type(op(x.as_subclass(Sub), w, b)) in (Sub, Tensor)
    assert again(op, x.as_subclass(Sub), w, b) is False


def test_results_are_as_the_mode_wants_them(linear):
    op, (x, w, b) = linear
    with torch.inference_mode():
        assert op(x, w, b).is_inference()
    assert not op(x, w, b).is_inference()
    large = draw.randn(600, 7), draw.randn(600, 7), None  # 1.4 MB
    for _ in range(3):
        op(*large)
    assert again(op, *large) is False


def test_errors_stay_errors(linear):
    op, (x, w, b) = linear
    for _ in range(3):
        with pytest.raises(ValueError, match="differ in K"):
            op(x[:, :5], w, b)
        with pytest.raises(ValueError, match="activation must be"):
            op(x, w, b, "elu")
        with pytest.raises(ValueError, match="bias must have shape"):
            op(x, w, b[:3])


def test_many_kinds_and_many_threads(linear):
    op, (_, w, b) = linear
    every = draw.randn(90, 7)

    def some(seed: int) -> bool:
        found = True
        for i in range(150):
            rows = every[: 1 + (seed * 31 + i * 7) % 90]
            found &= same_bits(op(rows, w, b), launched(op, rows, w, b))
        return found

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(some, range(4)))


def test_a_model_follows_its_weights_and_its_hooks(repeating):
    model = vit.create("vit_digits", backend=repeating, training=False).eval()
    images = draw.randn(2, model.in_chans, *model.patch_embed.img_size)

    def fresh() -> Tensor:
        """The logits of a copy, at a batch of another size, whose calls are others."""
        return model(torch.cat([images, images[:1]]))[:2]

    with torch.inference_mode():
        for _ in range(3):
            assert same_bits(model(images), fresh())
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
    with torch.inference_mode():
        assert same_bits(model(images), fresh())
        seen = []
        handle = model.blocks[1].attn.qkv.register_forward_hook(lambda m, args, y: seen.append(y.shape))
        hooked = model(images)
        assert len(seen) == 1
        assert same_bits(hooked, fresh())
        handle.remove()
        model.head.weight = nn.Parameter(torch.zeros_like(model.head.weight))
        assert same_bits(model(images), model.head.bias.expand(2, -1).contiguous())
