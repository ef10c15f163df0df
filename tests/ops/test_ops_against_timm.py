"""rms_norm, swiglu, rotary, and linear's scale and activations against PyTorch's and timm's own functions."""

from __future__ import annotations

from types import SimpleNamespace

import draw
import pytest
import torch
import torch.nn.functional as F
import vit
from conftest import NATIVE
from rounding import close
from torch import Tensor
from vit.backends import BackendError, Spec, _base, reasons

timm_layers = pytest.importorskip("timm.layers")


@pytest.fixture(params=["reference", *NATIVE])
def name(request: pytest.FixtureRequest) -> str:
    """Every backend that can be used here."""
    record = vit.backends()[request.param]
    if not record["available"] or "cpu" not in record["devices"]:
        pytest.skip(str(record["reason"]))
    return request.param


def agree(ours, theirs, *tensors: Tensor) -> None:
    """Results and the gradients of all tensors."""
    a, b = ([t.detach().clone().requires_grad_() for t in tensors] for _ in range(2))
    y, z = ours(*a), theirs(*b)
    dy = draw.randn_like(z)
    pairs = [(y, z), *zip(torch.autograd.grad(y, a, dy), torch.autograd.grad(z, b, dy), strict=True)]
    for got, want in pairs:
        assert got.dtype == want.dtype
        close(got, want)


def test_activations_are_those_of_pytorch(name):
    x = 3 * draw.randn(7, 33)
    agree(lambda x: vit.ops.silu(x, backend=name), F.silu, x)
    agree(lambda x: vit.ops.relu(x, backend=name), F.relu, torch.cat([x, torch.zeros(1, 33)]))
    agree(lambda x: vit.ops.quick_gelu(x, backend=name), lambda x: x * torch.sigmoid(1.702 * x), x)
    agree(lambda x: vit.ops.quick_gelu(x, backend=name), timm_layers.create_act_layer("quick_gelu"), x)


def test_rms_norm_is_that_of_pytorch_and_timm(name):
    x, w = draw.randn(5, 7, 24), 1 + 0.1 * draw.randn(24)
    agree(lambda x, w: vit.ops.rms_norm(x, w, 1e-5, backend=name), lambda x, w: F.rms_norm(x, (24,), w, 1e-5), x, w)
    agree(lambda x: vit.ops.rms_norm(x, backend=name), timm_layers.RmsNorm(24, affine=False), x)


def test_swiglu_is_that_of_timm(name):
    """Both forms of timm's layers, around their own projections."""
    packed, split = timm_layers.SwiGLUPacked(10, 20), timm_layers.SwiGLU(10, 20)
    x = draw.randn(2, 3, 10)
    agree(lambda x: packed.fc2(vit.ops.swiglu(packed.fc1(x), backend=name)), packed, x)
    agree(lambda x: split.fc2(vit.ops.swiglu(split.fc1_x(x), split.fc1_g(x), backend=name)), split, x)


def apply(x: Tensor, table: Tensor, prefix: int, half: bool) -> Tensor:
    """As timm's attention does: heads in front of tokens, the prefix cut off and put back."""
    q = x.transpose(1, 2)
    turned = timm_layers.apply_rot_embed_cat(q[:, :, prefix:], table, half=half)
    return torch.cat([q[:, :, :prefix], turned], dim=2).transpose(1, 2)


TABLES = {
    "axial": lambda: timm_layers.RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[3, 4]).get_embed(),
    "dinov3": lambda: timm_layers.RotaryEmbeddingDinoV3(16, feat_shape=[3, 4]).get_embed(),
    "per head": lambda: draw.randn(2, 12, 32),
    "per image": lambda: draw.randn(3, 1, 12, 32),
    "per image and head": lambda: draw.randn(3, 2, 12, 32),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_rotary_is_that_of_timm(name, kind, pairing):
    """On views of a packed projection, at a grid that is not square, with prefix tokens; both gradients."""
    table = TABLES[kind]()
    qkv = draw.randn(3, 14, 3, 2, 16)
    agree(
        lambda qkv, table: vit.ops.rotary(qkv[:, :, 1], table, 2, pairing, backend=name),
        lambda qkv, table: apply(qkv[:, :, 1], table, 2, pairing == "half"),
        qkv,
        table,
    )
    x = qkv[:, :, 0]
    assert vit.ops.rotary(x, table, 2, pairing, backend=name)[:, :2].equal(x[:, :2])


def test_rotary_keeps_a_wide_table_beside_narrow_heads(name):
    """bfloat16 queries and a float32 table: the sums are in float32, as timm's promotion has them."""
    x, table = draw.randn(2, 12, 2, 16).bfloat16(), draw.randn(12, 32)
    got = vit.ops.rotary(x, table, backend=name)
    assert got.dtype == torch.bfloat16
    close(got, apply(x, table, 0, False), 1)  # both are rounded once


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "silu", "relu"])
def test_a_scale_is_layer_scale(name, activation):
    """LayerScale behind a layer and in front of the sum; every gradient, also of a frozen layer's scale alone."""
    x, w, b, s, r = draw.randn(5, 8), draw.randn(6, 8), draw.randn(6), draw.randn(6), draw.randn(5, 6)
    s[2] = 0

    def ours(x: Tensor, w: Tensor, b: Tensor, s: Tensor, r: Tensor) -> Tensor:
        return vit.ops.linear(x, w, b, activation, r, s, backend=name)

    def theirs(x: Tensor, w: Tensor, b: Tensor, s: Tensor, r: Tensor) -> Tensor:
        y = F.linear(x, w, b)
        if activation is not None:
            curves = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
            curves["quick_gelu"] = lambda y: y * torch.sigmoid(1.702 * y)
            y = curves.get(activation, lambda y: F.gelu(y, approximate="tanh"))(y)
        return y * s + r

    agree(ours, theirs, x, w, b, s, r)
    agree(lambda s: ours(x, w, b, s, r), lambda s: theirs(x, w, b, s, r), s)
    agree(lambda x: ours(x, w, b, s, r), lambda x: theirs(x, w, b, s, r), x)


def test_a_scale_promotes_as_torch_does(name):
    """A float32 LayerScale of a bfloat16 layer gives float32; under autocast, too."""
    x, w, s = draw.randn(5, 8), draw.randn(6, 8), draw.randn(6)
    assert vit.ops.linear(x.bfloat16(), w.bfloat16(), scale=s, backend=name).dtype == torch.float32
    assert vit.ops.linear(x.bfloat16(), w.bfloat16(), scale=s.bfloat16(), backend=name).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert vit.ops.linear(x, w, scale=s, backend=name).dtype == torch.float32


def test_a_module_without_an_op_refuses_it_and_stays_usable(monkeypatch):
    """What a compiled module lacks is a reason in a plan, and an error that names it in a direct call."""

    module = SimpleNamespace(fields={}, contract=_base.CONTRACT, info=list)
    module.Activation = SimpleNamespace(__members__={"none": 0})
    monkeypatch.setattr(_base.importlib, "import_module", lambda name: module)
    assert _base._import("lacking") == (module, None)
    with pytest.raises(BackendError, match="'lacking' cannot run 'swiglu_fwd'"):
        module.swiglu_fwd(1, 2)
    record = type("Lacking", (_base.NativeBackend,), {"name": "lacking", "device_types": ("cpu",)})()
    monkeypatch.setitem(_base._LOADED, "lacking", (module, None))
    monkeypatch.setattr(type(record), "dtypes", (torch.float32,))
    assert reasons(record, Spec("swiglu", torch.float32), lambda spec: []) == ["its compiled module has no swiglu_fwd"]
    module.fields["linear_fwd"] = []
    silu = Spec("linear", torch.float32, options={"activation": "silu"})
    assert reasons(record, silu, lambda spec: []) == ["its compiled module has no activation silu"]
