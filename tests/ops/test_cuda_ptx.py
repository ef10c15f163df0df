"""The CUDA kernels without a GPU, as nvcc compiles them: their PTX is interpreted, their host code runs as it is.

`pytest -m ptx` runs a part of the case list on every device, and kernels that were broken on purpose; the whole list:

    cd tests && python -m ptx_emulator --folder ../build/ptx [--device 8.6] [--path portable]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import bias_gradients
import captures
import draw
import pytest
import torch
import vit
from attention_errors import results, unfused
from captures import Graph
from cuda_emulator import Emulated
from optim_helpers import KINDS, check_step
from ptx_emulator import DEVICES, Launches, backend, build, nvcc
from ptx_emulator.cases import failure
from ptx_emulator.mutations import MUTATIONS, Mutation, noticed
from quantized_helpers import (
    FORMS,
    check_conversion,
    check_epilogue,
    check_exact,
    check_long_sums,
    check_rows_without_a_scale,
    check_sums,
    check_weights_that_are_nan,
    layer,
)
from rounding import close
from torch import Tensor
from vit.ops.quantized import FP8, INT8
from vit.parity import Case, backend_ops, cases
from vit.parity.problems import DEFINITIONS
from vit.parity.problems import build as build_problem
from vit.parity.runner import _allow_tf32, call

pytestmark = [pytest.mark.ptx, pytest.mark.slow, pytest.mark.skipif(nvcc() is None, reason="no nvcc")]

CASES = [case for case in cases("cuda") if case.group != "large"]
#: A tenth of it, the one with the fewest products: a third of the others' time.
TENTH = CASES[5::10]
#: What attention_bwd_hopper.cu is for, and what it leaves to the others.
BACKWARD = [c for c in CASES if (c.op, c.direction) == ("attention", "bwd") and c.dtype in ("bfloat16", "float16")]
#: Kernels that the interpreter has seen least; their cases are small.
NEW = [case for case in CASES if case.op in ("rms_norm", "swiglu", "rotary", "attention_rows")]


@pytest.fixture(scope="module")
def emulated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Emulated, Launches]]:
    """The compiled module is kept between runs, unless pytest is to keep nothing (-p no:cacheprovider)."""
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("ptx_emulator") if cache else tmp_path_factory.mktemp("ptx_emulator")
    with backend(build(folder)) as both:
        yield both


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def check(emulated: tuple[Emulated, Launches], case: Case, device: str, path: str = "automatic") -> None:
    record, launches = emulated
    record.device = DEVICES[device]
    record.use(path)
    assert not failure(case, record, launches)


@pytest.mark.parametrize(
    ("case", "device"),
    list(zip(TENTH, itertools.cycle(["9.0", "8.6", "9.0", "8.0", "9.0", "12.0"]), strict=False)),
    ids=lambda value: getattr(value, "id", value),
)
def test_parity(emulated, case, device):
    check(emulated, case, device)


@pytest.mark.parametrize("case", CASES[7::80], ids=lambda case: case.id)
@pytest.mark.parametrize("path", ["portable", "no_wgmma"])
def test_parity_of_other_paths(emulated, case, path):
    check(emulated, case, "9.0", path)


@pytest.mark.parametrize("case", BACKWARD[2::8], ids=lambda case: case.id)
def test_parity_of_the_backward_by_wgmma(emulated, case):
    check(emulated, case, "9.0", "wgmma_backward")


@pytest.mark.parametrize(
    ("n", "keys", "d", "seeds"), [(70, 70, 64, (1, 2)), (40, 150, 80, (3,)), (20, 33, 96, (4,)), (33, 20, 128, (5,))]
)
def test_the_backward_by_wgmma_in_any_order(emulated, n, keys, d, seeds):
    """Warps in a random order have the bits of all at once."""
    record, launches = emulated
    name, _ = on(emulated, "9.0")
    record.use("wgmma_backward")
    launches.done.clear()
    tensors = [draw.randn(1, tokens, 1, d, dtype=torch.bfloat16) for tokens in (n, keys, keys, n)]
    found = []
    for seed in (None, *seeds):
        launches.seed = seed
        try:
            found.append(results(backend_ops(name).attention, tensors))
        finally:
            launches.seed = None
    assert not launches.errors
    for other in found[1:]:
        assert all(a.equal(b) for a, b in zip(found[0], other, strict=True))
    for mine, plain, exact in zip(
        found[0], results(unfused, tensors), results(unfused, [x.double() for x in tensors]), strict=True
    ):
        assert (mine.double() - exact).norm() <= 1.1 * (plain.double() - exact).norm()
    assert "attention_bwd_hopper" in {launches.files[kernel] for kernel in launches.done}


@pytest.mark.parametrize(
    ("device", "path", "n", "d", "file"),
    [
        ("9.0", "wgmma_backward", 30, 64, "attention_bwd_hopper"),
        ("9.0", "wgmma_backward", 450, 64, "attention_bwd_mma"),  # more than a block has shared memory for
        ("9.0", "wgmma_backward", 20, 30, "attention_bwd_mma"),
        ("9.0", "automatic", 30, 64, "attention_bwd_short"),
        ("8.6", "wgmma_backward", 30, 64, "attention_bwd_short"),
    ],
)
def test_which_backward_runs(emulated, device, path, n, d, file):
    record, launches = emulated
    name, _ = on(emulated, device)
    record.use(path)
    x = draw.randn(1, n, 1, d, dtype=torch.bfloat16)
    launches.done.clear()
    results(backend_ops(name).attention, [x, x, x, x])
    assert file in {launches.files[kernel] for kernel in launches.done if "bwd" in launches.files[kernel]}
    assert len({launches.files[kernel] for kernel in launches.done if "bwd" in launches.files[kernel]}) == 1


@pytest.mark.parametrize("case", NEW[4::10], ids=lambda case: case.id)
def test_parity_of_the_newest_kernels(emulated, case):
    check(emulated, case, "12.0")


#: One element, odd sizes, several tiles and more steps of k than stages.
@pytest.mark.parametrize("form", **FORMS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 7, 3), (70, 136, 528)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_8bit(emulated, dtype, m, n, k, form):
    there = on(emulated, "8.0" if form is INT8 else "8.9")
    check_sums(form, *there, draw.randn(m, k + 3).to(dtype)[:, :k], *layer(n, k, form))
    if dtype == torch.bfloat16:
        check_exact(form, *there, m, n, k, dtype)
    assert not emulated[1].errors


@pytest.mark.parametrize("form", **FORMS)
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
def test_linear_8bit_epilogue(emulated, activation, form):
    there = on(emulated, "12.0")
    check_epilogue(*there, activation, True, torch.bfloat16, form)
    check_rows_without_a_scale(*there, form)


@pytest.mark.parametrize("form", **FORMS)
def test_linear_8bit_conversion(emulated, form):
    check_conversion(form, *on(emulated, "9.0"))


def test_linear_fp8_at_its_limits(emulated):
    there = on(emulated, "8.9")
    check_long_sums(*there)
    check_weights_that_are_nan(*there)


@pytest.mark.parametrize("device", ["8.0", "8.6"])
def test_linear_fp8_on_a_gpu_without_it(emulated, device):
    with pytest.raises(RuntimeError, match=rf"compute capability 8\.9, this GPU has {device}: use linear_int8"):
        check_sums(FP8, *on(emulated, device), draw.randn(2, 32), *layer(8, 32, FP8))


@pytest.mark.parametrize(("rows", "n", "k"), bias_gradients.SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("path", ["automatic", "portable"])
def test_the_weights_gradient_brings_that_of_the_bias(emulated, path, dtype, rows, n, k):
    """No pass over dy of its own, unless the gradient of the bias alone is wanted."""
    name, _ = on(emulated, "9.0")
    emulated[0].use(path)
    emulated[1].done.clear()
    bias_gradients.check_bias_gradient(name, dtype, rows, n, k)
    assert sum(row[0] for kernel, row in emulated[1].done.items() if "prepare_dz" in kernel) == 1
    assert not emulated[1].errors


def test_sums_of_rows_keep_what_tf32_drops(emulated):
    name, _ = on(emulated, "8.0")
    with _allow_tf32(True):
        bias_gradients.check_bias_gradient(name, torch.float32, 70, 136, 200, large=8191)
    assert not emulated[1].errors


def on(emulated: tuple[Emulated, Launches], device: str) -> tuple[str, torch.device]:
    """Where the kernels of an emulated GPU are called."""
    record, launches = emulated
    launches.fresh()
    record.device = DEVICES[device]
    return record.name, torch.device("cpu")


@pytest.mark.parametrize(("dtype", "state"), [*KINDS, (torch.float16, "8bit")])
def test_adamw(emulated, dtype, state):
    record, launches = emulated
    launches.fresh()
    record.device = DEVICES["9.0"]
    check_step(record.name, torch.device("cpu"), dtype, state)


def replayed(emulated: tuple[Emulated, Launches], f: Callable[[], list[Tensor]], *inputs: Tensor) -> None:
    captures.replayed(emulated[0], f, inputs)
    assert not emulated[1].errors


@pytest.mark.parametrize(
    ("device", "path", "cases"),
    [("9.0", "automatic", CASES[::3]), ("9.0", "portable", CASES[1::7]), ("8.0", "automatic", CASES[2::7])],
    ids=lambda value: str(value) if isinstance(value, str) else f"{len(value)}",
)
def test_nothing_but_launches_in_a_capture(emulated, device, path, cases):
    """The host code of the list, whose kernels need not run for that. (All of it takes a minute.)"""
    record, launches = emulated
    name, _ = on(emulated, device)
    record.use(path)
    ops = backend_ops(name)
    found = []
    for case in cases:
        problem = build_problem(case)
        for capture in (False, True):  # the first warms up
            record.capture(capture)
            launches.capturing = True
            call(problem, lambda t, case=case: DEFINITIONS[case.op].call(ops, case, t))
            record.capture(False)
        found += [f"{case.id}: {record.refused()}"] if record.refused() else []
        assert launches.kept or case.group == "corner"
        launches.kept.clear()
    assert not found


#: Of each op one case of either direction in bfloat16.
CAPTURED = {(case.op, case.direction): case for case in CASES if case.dtype == "bfloat16" and not case.values}


@pytest.mark.parametrize("device", ["9.0", "8.6"])
@pytest.mark.parametrize("case", CAPTURED.values(), ids=lambda case: case.id)
def test_ops_in_a_graph(emulated, case, device):
    """With the host code as nvcc compiles it: nothing but launches in a capture, and the bits of a call."""
    name, _ = on(emulated, device)
    problem, ops = build_problem(case), backend_ops(name)
    results = lambda: list(call(problem, lambda t: DEFINITIONS[case.op].call(ops, case, t)).values())  # noqa: E731
    replayed(emulated, results, *problem.tensors.values())


@pytest.mark.parametrize("device", ["9.0", "8.0"])
def test_larger_products_in_a_graph(emulated, device):
    """Among them those whose tensor maps are parameters of a launch."""
    name, _ = on(emulated, device)
    a, b = draw.randn(130, 200, dtype=torch.bfloat16), draw.randn(128, 200, dtype=torch.bfloat16)
    q = draw.randn(1, 70, 1, 64, dtype=torch.bfloat16)
    ops = backend_ops(name)
    emulated[1].done.clear()
    replayed(emulated, lambda: [ops.matmul(a, b.mT), ops.attention(q, q, q)], a, b, q)
    files = {emulated[1].files[kernel] for kernel in emulated[1].done}
    hopper, others = {"gemm_hopper", "attention_fwd_hopper"}, {"gemm_mma", "attention_fwd_short"}
    assert files >= (hopper if device == "9.0" else others)


@pytest.mark.parametrize(
    ("device", "path", "files"),
    [
        ("9.0", "automatic", {"gemm_hopper", "attention_fwd_hopper"}),
        ("9.0", "wgmma_backward", {"gemm_hopper", "attention_fwd_hopper", "attention_bwd_hopper"}),
        ("9.0", "no_overlap", set()),
        ("9.0", "no_wgmma", set()),
        ("8.9", "automatic", set()),
        ("12.0", "automatic", set()),
    ],
)
def test_which_kernels_begin_before_the_one_in_front_has_ended(emulated, device, path, files):
    """Those compiled for 9.0a alone, which wait by themselves: code of 8.0, also where a driver compiles its PTX for
    newer GPUs, has no such instruction. That they wait before all else the machine checks in every launch."""
    record, launches = emulated
    name, _ = on(emulated, device)
    record.use(path)
    launches.overlapped.clear()
    ops, x = backend_ops(name), draw.randn(1, 70, 1, 64, dtype=torch.bfloat16)
    results(ops.attention, [x, x, x, x])
    ops.matmul(x[0, :, 0], draw.randn(64, 64, dtype=torch.bfloat16))
    assert {launches.files[kernel] for kernel in launches.overlapped} == files


@pytest.mark.parametrize("form", **FORMS)
def test_products_of_8_bits_in_a_graph(emulated, form):
    name, _ = on(emulated, "8.9")
    x, (weight, scale) = draw.randn(33, 40, dtype=torch.bfloat16), layer(24, 40, form)
    replayed(emulated, lambda: [getattr(vit.ops, form.routine)(x, weight, scale, backend=name)], x)


@pytest.mark.parametrize(("dtype", "state"), [(torch.float32, "float32"), (torch.bfloat16, "8bit")], ids=str)
def test_training_steps_in_a_graph(emulated, dtype, state):
    """Forward, backward and AdamW of a small model; parameters go on from where the step before left them."""
    name, _ = on(emulated, "9.0")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1, "num_classes": 5}

    def trained(capture: bool) -> list[Tensor]:
        draw.restart("training")
        model = draw.fill(vit.create("vit_tiny_patch16_224", **sizes, backend=name, dtype=dtype), 0.1)
        images, labels = draw.randn(2, 3, 16, 16).to(dtype), torch.tensor([1, 0])
        optimizer = vit.optim.AdamW(model.parameters(), state=state, capturable=True, backend=name)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(images).float(), labels).backward()
            optimizer.step()

        step()
        graph = Graph(emulated[0])
        if capture:
            with graph.capture():
                step()
        for _ in range(2):
            (graph.replay if capture else step)()
        states = [t for p in model.parameters() for t in optimizer.state[p].values()]
        return [*(p.detach() for p in model.parameters()), *states]

    for found, expected in zip(trained(True), trained(False), strict=True):
        assert torch.equal(found, expected)
    assert not emulated[1].errors


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(
    ("dtype", "d"),
    [*(("float32", d) for d in (65, 80, 128, 129, 256)), *(("float64", d) for d in (64, 80, 128))],
)
def test_exact_attention_runs_in_99_kib(emulated, dtype, d, direction):
    sizes = (("b", 1), ("n", 20), ("h", 1), ("d", d))
    check(emulated, Case("attention", "", sizes, dtype=dtype, direction=direction), "8.6")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-44, 1e-46])
def test_a_scale_that_is_zero_in_float32_gives_the_mean_of_the_values(emulated, device, scale):
    record, launches = emulated
    launches.fresh()
    record.device = DEVICES[device]
    record.use("automatic")
    q, k, v = draw.randn(3, 1, 20, 1, 64, dtype=torch.bfloat16)
    got = vit.ops.attention(q, k, v, scale=scale, backend=record.name)
    close(got, v.double().mean(1, keepdim=True).expand_as(got), 1)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}-{mutation.what}")
def test_a_broken_kernel_is_noticed(emulated, mutation: Mutation):
    record, launches = emulated
    record.device = DEVICES["9.0"]
    record.use(mutation.path)
    good, text = noticed(launches, mutation)
    assert good, text
