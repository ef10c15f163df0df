"""The tolerance rule catches wrong kernels: each test breaks PyTorch's own op in one way that must be found."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vit.parity import CASES, Case, backend_ops, cases, compare, run
from vit.parity.problems import build

CASE = {case.id: case for case in CASES}


def kernels(**wrong: object) -> SimpleNamespace:
    """The reference with some ops replaced."""
    return SimpleNamespace(**(vars(backend_ops("reference")) | wrong))


def fails(case_id: str, **wrong: object) -> str:
    """The text of the failure of a broken kernel, after its sound version has passed."""
    case = CASE[case_id]
    sound = run(case, backend_ops("reference"))
    assert sound.ok, sound.text
    result = run(case, kernels(**wrong))
    assert not result.ok
    assert not result.skipped
    assert result.text.startswith(case_id)
    return result.text


class Backward(torch.autograd.Function):
    """The identity forward; backward multiplies by a factor: a kernel with a wrong gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy * ctx.factor, None


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_perturbed_row_is_found_and_named(dtype):
    def linear(*args, **kwargs):
        y = F.linear(*args)
        y[5] *= 1.5
        return y

    text = fails(
        f"linear-fwd-{dtype}-m197n768k768-residual".replace("-residual", "").replace("n768k768", "n576k192"),
        linear=linear,
    )
    assert "[5, " in text


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_a_wrong_scale_is_found(dtype, factor):
    ops = backend_ops("reference")
    fails(f"matmul-fwd-{dtype}-m197n384k384", matmul=lambda a, b: ops.matmul(a, b) * factor)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tanh_instead_of_erf_is_found(dtype):
    fails(f"gelu-fwd-{dtype}-m197c768", gelu=lambda x, approximate: F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_softmax_scale_of_another_head_dimension_is_found(dtype):
    def attention(q, k, v, scale=None, lengths=None):
        return backend_ops("reference").attention(q, k, v, 1.1 * q.shape[-1] ** -0.5)

    fails(f"attention-fwd-{dtype}-b1n197h3d64-packed", attention=attention)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_swapped_gradients_are_found(dtype):
    class Swapped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return backend_ops("reference").attention(q, k, v)

        @staticmethod
        def backward(ctx, dout):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                out = backend_ops("reference").attention(*leaves)
            dq, dk, dv = torch.autograd.grad(out, leaves, dout)
            return dk, dq, dv

    text = fails(f"attention-bwd-{dtype}-b1n197h3d64-packed", attention=lambda q, k, v, **_: Swapped.apply(q, k, v))
    assert "gradient of" in text


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@pytest.mark.parametrize("factor", [0.0, -1.0, 1.05])
def test_a_wrong_gradient_is_found_and_named(name, factor):
    def layer_norm(x, weight, bias, eps):
        t = {"x": x, "weight": weight, "bias": bias}
        t[name] = Backward.apply(t[name], factor)
        return F.layer_norm(t["x"], x.shape[-1:], t["weight"], t["bias"], eps)

    assert f"gradient of {name}" in fails("layer_norm-bwd-bfloat16-m197c384", layer_norm=layer_norm)


def test_a_one_pass_variance_is_found():
    """E[x^2] - E[x]^2 loses every digit when the mean is large."""

    def layer_norm(x, weight, bias, eps):
        mean = x.mean(-1, keepdim=True)
        variance = (x * x).mean(-1, keepdim=True) - mean * mean
        return (x - mean) / (variance + eps).sqrt() * weight + bias

    fails("layer_norm-fwd-float32-m19c130-offset_x", layer_norm=layer_norm)


def test_sums_in_bfloat16_are_found():
    def matmul(a, b):
        c = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)
        for k in range(a.shape[1]):
            c += a[:, k, None] * b[None, k]
        return c

    fails("matmul-fwd-bfloat16-m197n384k384", matmul=matmul)


def test_a_lost_tail_is_found():
    """The last column of k is left out, as by a loop over whole vectors."""
    fails("matmul-fwd-bfloat16-m9n49k17", matmul=lambda a, b: a[:, :-1] @ b[:-1])


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_swallowed_nan_or_infinity_is_found(kind):
    text = fails(f"matmul-fwd-float32-m21n50k35-{kind}_a", matmul=lambda a, b: torch.nan_to_num(a @ b))
    assert "NaN or Inf differ" in text


def test_an_invented_nan_is_found():
    def gelu(x, approximate):
        y = F.gelu(x)
        y.view(-1)[3] = torch.nan
        return y

    assert "[0, 3]: got nan" in fails("gelu-fwd-float32-m17c256", gelu=gelu)


@pytest.mark.parametrize(
    "change", [lambda y: y.double(), lambda y: y[:-1], lambda y: y.mT], ids=["dtype", "rows", "transposed"]
)
def test_a_wrong_shape_or_dtype_is_found(change):
    assert "must be" in fails("matmul-fwd-float32-m197n384k384", matmul=lambda a, b: change(a @ b))


def test_a_missing_gradient_is_an_error():
    case = CASE["linear-bwd-float32-m7n13k11"]
    with pytest.raises(AssertionError, match="no gradient reaches bias"):
        run(case, kernels(linear=lambda x, weight, bias, **_: F.linear(x, weight, bias.detach())))


def test_the_failure_says_where_and_how_much():
    truth = torch.zeros(3, 4, dtype=torch.float64)
    got, baseline = truth.float(), truth.float()
    truth[1, 2] = 1
    got[1, 2], got[2, 0] = 1, 0.25
    baseline[1, 2] = 1.001
    verdict = compare("out", got, truth, baseline, truth, dtype=torch.float32, compute_dtype=torch.float32)
    assert not verdict.ok
    assert verdict.error == 0.25
    assert verdict.bound == pytest.approx(2e-3, rel=1e-2)
    assert "error 0.25 at [2, 0]: got 0.25, truth 0; bound 0.002" in verdict.text
    assert "torch's own error: 0.001 at [1, 2]: got 1.001, truth 1" in verdict.text


def test_padding_between_values_is_nan():
    """So that a kernel which reads past a row shows it."""
    for layout in ("rows", "columns", "offset3", "packed", "tokens"):
        case = next(c for c in CASES if c.layout == layout and c.op == "attention")
        q = build(case).tensors["q"]
        assert not q.isnan().any()
        assert torch.as_strided(q, (q.untyped_storage().nbytes() // q.element_size(),), (1,), 0).isnan().any()


def test_ids_are_unique_and_inputs_repeatable():
    assert len(CASE) == len(CASES)
    assert all(case.id.split("-")[:2] == [case.op, case.direction] for case in CASES)
    case = CASE["linear-bwd-float32-m37n53k41-gelu-residual-rows"]
    first, second = build(case), build(case)
    assert all(first.tensors[name].equal(second.tensors[name]) for name in first.tensors)
    assert first.dy.equal(second.dy)


def test_every_op_has_cases_of_every_group_dtype_and_direction():
    seen = {(c.op, c.group, c.dtype, c.direction) for c in CASES}
    for op in ("layer_norm", "gelu", "matmul", "linear", "attention"):
        for group in ("regular", "odd", "corner", "large"):
            for dtype in ("float32", "bfloat16") if group == "large" else ("float32", "float64", "bfloat16"):
                for direction in ("fwd", "bwd"):
                    assert (op, group, dtype, direction) in seen


def test_gpu_lists_have_float16_in_place_of_float64():
    assert {case.dtype for case in cases("cuda")} == {"float32", "bfloat16", "float16"}
    assert {case.dtype for case in cases("cpu")} == {"float32", "float64", "bfloat16"}


def test_records_are_json_even_when_the_error_is_no_number():
    case: Case = CASE["matmul-fwd-float32-m21n50k35-nan_a"]
    record = run(case, kernels(matmul=lambda a, b: torch.nan_to_num(a @ b))).record()
    assert json.loads(json.dumps(record, allow_nan=False))["error"] is None
    assert {"id", "op", "dtype", "direction", "error", "bound", "ok"} <= record.keys()


def test_a_refusal_is_skipped_and_never_a_pass():
    from vit.backends import BackendError

    def refuse(a, b):
        raise BackendError("not on this machine")

    result = run(CASE["matmul-fwd-float32-m7n13k11"], kernels(matmul=refuse))
    assert (result.ok, result.skipped, result.text) == (False, True, "not on this machine")
    assert dataclasses.replace(result, skipped=False).record()["ok"] is False


def test_only_what_pytorch_itself_gets_wrong_is_skipped_for_the_reference(monkeypatch):
    """PyTorch's float32 GELU of infinity is NaN on some processors: here on every one."""
    own = F.gelu

    def gelu(x, approximate="none"):
        y = own(x, approximate=approximate)
        return y.masked_fill(x.isinf(), torch.nan) if x.dtype == torch.float32 else y

    monkeypatch.setattr(F, "gelu", gelu)
    case = CASE["gelu-fwd-float32-m7c61-inf_x"]
    result = run(case, backend_ops("reference"), plain=True)
    assert (result.ok, result.skipped) == (False, True)
    assert "PyTorch's own op gives this, too: out: NaN or Inf differ" in result.text
    assert not run(case, backend_ops("reference")).skipped
    wrong = run(case, kernels(gelu=lambda x, approximate: gelu(x) * 1.01), plain=True)
    assert (wrong.ok, wrong.skipped) == (False, False)
