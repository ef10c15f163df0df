"""The CUDA kernels without a GPU: compiled for the CPU with an emulator of the instructions they use, and held to the
same case list as every backend; their index functions and launch plans by brute force."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bias_gradients
import cuda_emulator
import draw
import pytest
import quantized_helpers
import torch
import torch.nn.functional as F
import vit
from attention_errors import error_ratios, results, unfused
from cuda_emulator import PATHS, Emulated
from optim_helpers import KINDS, check_code, check_step
from quantized_helpers import FORMS, check_epilogue, check_rows_without_a_scale, layer
from rounding import close
from vit.backends.cuda import tf32_allowed
from vit.ops import OPS
from vit.ops.bound import spec_of
from vit.ops.quantized import FP8
from vit.parity import Case, backend_ops, cases, run
from vit.parity.tf32 import round_factor

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="no C++ compiler")

#: Every shape appears in some dtype and direction; all of them would take minutes. "large" is for real GPUs.
EMULATED = [case for case in cases("cuda") if case.group != "large"][::9]
#: The list of a GPU has float16 in the place of float64; the kernels have both.
FLOAT64 = [case for case in cases("cpu", dtypes=["float64"]) if case.group != "large"]
FLOAT64 = [case for case in FLOAT64 if case.op == "gelu"] + FLOAT64[::9]
PRODUCTS = [case for case in EMULATED if case.op in ("matmul", "linear") and case.dtype != "float32"][::2]


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_emulator.kept(request, tmp_path_factory)


@pytest.fixture(scope="module")
def emulated(built: Path) -> Iterator[Emulated]:
    with cuda_emulator.registered(cuda_emulator.build(built)) as record:
        yield record


@pytest.fixture(autouse=True)
def _automatic(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "emulated" in request.fixturenames:
        emulated = request.getfixturevalue("emulated")
        emulated.use("automatic")
        emulated.device = 0


def check(case: Case) -> None:
    result = run(case, backend_ops("cuda_emulator"))
    assert not result.skipped, result.text
    assert result.ok, result.text


@pytest.mark.parametrize("case", EMULATED, ids=lambda case: case.id)
def test_parity_of_the_hopper_path(emulated, case):
    check(case)


@pytest.mark.parametrize("case", FLOAT64, ids=lambda case: case.id)
def test_parity_in_float64(emulated, case):
    check(case)


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.id)
def test_parity_of_the_portable_path(emulated, case):
    emulated.use("portable")
    check(case)


#: Each compiled tile and operand layout of the Hopper product, more steps than stages, tiles for both warpgroups.
HOPPER = [
    (1, 100, 64, 1000, "nt"),
    (1, 300, 72, 136, "nn"),
    (2, 70, 64, 80, "nn"),
    (1, 1100, 1024, 200, "nt"),
    (1, 1100, 1152, 200, "nt"),
    (1, 1100, 1024, 136, "nn"),
    (1, 136, 264, 3000, "tn"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "m", "n", "k", "layout"), HOPPER)
def test_hopper_tiles(emulated, dtype, batch, m, n, k, layout):
    a = draw.randn(batch, m, k, dtype=dtype)
    b = draw.randn(batch, k, n, dtype=dtype)
    a = a.mT.contiguous().mT if layout[0] == "t" else a
    b = b.mT.contiguous().mT if layout[1] == "t" else b
    got = vit.ops.matmul(a, b, backend="cuda_emulator").double()
    truth = a.double() @ b.double()
    own = ((a @ b).double() - truth).norm()
    assert (got - truth).norm() <= 1.1 * own


@pytest.mark.parametrize(("rows", "n", "k"), bias_gradients.SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("path", ["automatic", "portable"])
def test_the_weights_gradient_brings_that_of_the_bias(emulated, path, dtype, rows, n, k):
    emulated.use(path)
    bias_gradients.check_bias_gradient(emulated.name, dtype, rows, n, k)


#: Each compiled size of the Hopper attention (keys, head dimension): the last key alone in its group, more and fewer
#: queries than one tile, two tiles per block, one key.
HOPPER_ATTENTION = [
    (1, 5, 1, 64),
    (2, 50, 50, 64),
    (1, 130, 128, 64),
    (1, 197, 197, 64),
    (8, 70, 129, 64),
    (1, 64, 208, 32),
    (1, 65, 257, 64),
    (1, 20, 201, 80),
    (1, 257, 257, 80),
    (1, 17, 272, 72),
    (1, 33, 197, 88),
    (1, 66, 250, 96),
    (1, 40, 197, 104),
    (1, 16, 265, 128),
]


@pytest.mark.parametrize("path", ["automatic", "no_wgmma"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "n", "keys", "d"), HOPPER_ATTENTION)
def test_hopper_attention(emulated, dtype, batch, n, keys, d, path):
    """Packed and separate tensors, against the same sums of products in float64; the bits of an image stay its own."""
    emulated.use(path)
    q = draw.randn(batch, n, 2, d, dtype=dtype)
    k, v = draw.randn(batch, keys, 2, 2, d, dtype=dtype).unbind(2)
    got = vit.ops.attention(q, k, v, backend="cuda_emulator")
    truth = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    own = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert (got.double() - truth).norm() <= 1.1 * (own.double() - truth).norm()
    assert vit.ops.attention(q[-1:], k[-1:], v[-1:], backend="cuda_emulator").equal(got[-1:])


#: Each compiled head dimension of the backward by wgmma: fewer tokens than a step, tiles whose last step is moved back,
#: more tiles than warpgroups, a block of four warpgroups, and what goes to another kernel (too long: 900 keys). Of few
#: tokens more images: the errors of a handful of roundings scatter.
WGMMA_BACKWARD = [
    (8, 5, 3, 64),
    (2, 50, 50, 64),
    (1, 197, 197, 64),
    (1, 300, 200, 56),
    (1, 20, 900, 64),
    (1, 40, 201, 72),
    (1, 66, 100, 88),
    (1, 17, 197, 104),
    (1, 130, 64, 128),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "n", "keys", "d"), WGMMA_BACKWARD)
def test_wgmma_backward(emulated, dtype, batch, n, keys, d):
    """Against the unfused form in float64 and in the same dtype; the bits of an image stay its own."""
    emulated.use("wgmma_backward")
    ours = functools.partial(vit.ops.attention, backend="cuda_emulator")
    tensors = [draw.randn(batch, tokens, 2, d, dtype=dtype) for tokens in (n, keys, keys, n)]
    got = results(ours, tensors)
    for mine, plain, exact in zip(
        got, results(unfused, tensors), results(unfused, [x.double() for x in tensors]), strict=True
    ):
        assert (mine.double() - exact).norm() <= 1.1 * (plain.double() - exact).norm()
    for alone, among in zip(results(ours, [x[-1:] for x in tensors]), got, strict=True):
        assert alone.equal(among[-1:])


def test_wgmma_backward_into_a_packed_projection(emulated):
    """The three gradients are one tensor, with the bits of three."""
    emulated.use("wgmma_backward")
    qkv, dout = draw.randn(1, 70, 3, 2, 64, dtype=torch.bfloat16), draw.randn(1, 70, 2, 64, dtype=torch.bfloat16)
    ours = functools.partial(vit.ops.attention, backend="cuda_emulator")
    packed = qkv.clone().requires_grad_()
    (got,) = torch.autograd.grad(ours(*packed.unbind(2)), packed, dout)
    _, *apart = results(ours, [*(x.contiguous() for x in qkv.unbind(2)), dout])
    assert got.equal(torch.stack(apart, 2))


@pytest.fixture(params=["bfloat16", "float32", "tf32"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """How products are computed; TF32 is allowed while the test runs where it says so."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("batch", [1, 200])
def test_portable_tiles(emulated, precision, batch, layout):
    """Each compiled tile and operand layout of the portable product: tiles of 64, and of 128 where there are many."""
    emulated.use("portable")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = draw.randn(batch, 96, 72, dtype=dtype), draw.randn(batch, 72, 104, dtype=dtype)
    a = a.mT.contiguous().mT if layout[0] == "t" else a
    b = b.mT.contiguous().mT if layout[1] == "t" else b
    got = vit.ops.matmul(a, b, backend="cuda_emulator").double()
    a, b = ((round_factor(x) if precision == "tf32" else x).double() for x in (a, b))
    assert (got - a @ b).norm() <= (2e-3 if precision == "bfloat16" else 1e-6) * (a @ b).norm()


@pytest.mark.parametrize("path", ["automatic", "portable"])
def test_a_row_does_not_depend_on_the_others(emulated, precision, path):
    """The tile size follows the number of rows; the bits of a row do not."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    emulated.use(path)
    x, w, b = draw.randn(1100, 200, dtype=dtype), draw.randn(1152, 200, dtype=dtype), draw.randn(1152, dtype=dtype)
    linear = backend_ops("cuda_emulator").linear
    many = linear(x, w, b, activation="gelu")
    for rows in (1, 50, 130):
        assert linear(x[:rows].clone(), w, b, activation="gelu").equal(many[:rows])


def test_gradients_are_the_same_in_every_run(emulated):
    """Threads run in another order each time; sums do not."""
    q, k, v = draw.randn(3, 1, 150, 2, 64, dtype=torch.bfloat16)
    x, w = draw.randn(2100, 40, dtype=torch.bfloat16), draw.randn(48, 40, dtype=torch.bfloat16)

    def gradients() -> list[torch.Tensor]:
        ops = backend_ops("cuda_emulator")
        leaves = [t.detach().requires_grad_() for t in (q, k, v, x, w)]
        (ops.attention(*leaves[:3]).float().square().sum() + ops.linear(*leaves[3:]).float().square().sum()).backward()
        return [leaf.grad for leaf in leaves]

    for first, second in zip(gradients(), gradients(), strict=True):
        assert first.equal(second)


@pytest.mark.parametrize(("dtype", "state"), [*KINDS, (torch.float16, "8bit")])
def test_adamw(emulated, dtype, state):
    check_step(emulated.name, torch.device("cpu"), dtype, state)
    if state == "8bit":
        check_code(emulated.name, torch.device("cpu"), dtype)


#: One element, odd sizes, more steps of k than stages, tiles of 128.
BYTES = [(1, 1, 1), (5, 7, 3), (33, 100, 130), (70, 136, 528), (1793, 1793, 16)]


@pytest.mark.parametrize("form", **FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), BYTES)
def test_linear_8bit(emulated, dtype, m, n, k, form):
    """Also with a weight that 16-byte copies cannot read and rows of x apart."""
    x, there = draw.randn(m, k + 3).to(dtype)[:, :k], ("cuda_emulator", torch.device("cpu"))
    weight = layer(n, k, form)
    got = quantized_helpers.check_sums(form, *there, x, *weight)
    assert torch.equal(quantized_helpers.run(form, *there, x[-1:], *weight), got[-1:])
    quantized_helpers.check_exact(form, *there, min(m, 200), min(n, 200), k, dtype)


@pytest.mark.parametrize("form", **FORMS)
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
@pytest.mark.parametrize("wide", [False, True])
def test_linear_8bit_epilogue(emulated, activation, wide, form):
    check_epilogue("cuda_emulator", torch.device("cpu"), activation, wide, torch.bfloat16, form)


@pytest.mark.parametrize("form", **FORMS)
def test_linear_8bit_conversion(emulated, form):
    quantized_helpers.check_conversion(form, "cuda_emulator", torch.device("cpu"))
    check_rows_without_a_scale("cuda_emulator", torch.device("cpu"), form)


def test_linear_fp8_at_its_limits(emulated):
    quantized_helpers.check_long_sums("cuda_emulator", torch.device("cpu"))
    quantized_helpers.check_weights_that_are_nan("cuda_emulator", torch.device("cpu"))


def test_linear_fp8_on_a_gpu_without_it(emulated, monkeypatch):
    """A reason of plans, and an error of the call: it is never something else that runs."""
    record = cuda_record(emulated, monkeypatch, [(8, 9), (8, 6)])
    shapes = {"x": ("*", 32), "weight": (8, 32)}
    for index, text in ((0, []), (1, ["compute capability 8.6 of GPU 1 is below 8.9"])):
        for op, reasons in (("linear_fp8", text), ("linear_int8", [])):
            spec = vit.ops.Spec(op, torch.float32, shapes, False, device_type="cuda", device_index=index)
            assert record.reasons(spec) == reasons
    emulated.device = 2
    with pytest.raises(RuntimeError, match=r"products of e4m3 begin with compute capability 8\.9, this GPU has 8\.6"):
        quantized_helpers.run(FP8, "cuda_emulator", torch.device("cpu"), draw.randn(2, 32), *layer(8, 32, FP8))


def test_layouts(tmp_path):
    program = tmp_path / "layout_test"
    source = cuda_emulator.HERE / "layout_test.cpp"
    include = f"-I{cuda_emulator.CSRC / 'cuda'}"
    cuda_emulator.run([cuda_emulator.compiler(), "-std=c++17", include, str(source), "-o", str(program)])
    assert cuda_emulator.run([str(program)]) == "ok\n"


def compile_probes(program: Path, *include: Path) -> list[str]:
    """benchmarks/gpu/probe.cu on the emulator, with headers from `include` first; the names of the probes."""
    root = cuda_emulator.CSRC.parent
    search = [*include, cuda_emulator.CSRC, cuda_emulator.CSRC / "cuda"]
    command = [cuda_emulator.compiler(), "-std=c++17", "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    command += [*(f"-I{folder}" for folder in search), "-include", str(cuda_emulator.HERE / "hopper_instructions.cuh")]
    command += ["-x", "c++", str(root / "benchmarks/gpu/probe.cu"), str(cuda_emulator.HERE / "emulator.cpp")]
    cuda_emulator.run([*command, "-o", str(program)])
    return cuda_emulator.run([str(program)]).splitlines()


def test_probes_of_the_gpu(tmp_path):
    names = compile_probes(tmp_path / "probe")
    assert len(names) >= 10
    for name in names:
        cuda_emulator.run([str(tmp_path / "probe"), name])


def test_a_probe_says_what_is_wrong(tmp_path):
    """The two distances of the descriptors without a swizzle, exchanged."""
    text = (cuda_emulator.CSRC / "cuda/layout.cuh").read_text()
    wrong = text.replace("row, 0), 128, 16 * rows)", "row, 0), 16 * rows, 128)")
    assert wrong != text
    (tmp_path / "layout.cuh").write_text(wrong)
    compile_probes(tmp_path / "probe", tmp_path)
    done = subprocess.run([tmp_path / "probe", "wgmma, plain columns, a in registers"], capture_output=True, text=True)
    assert done.returncode == 1
    assert " wrong, the first at " in done.stdout
    assert done.stdout.endswith("; right with the two distances exchanged\n")


@pytest.mark.parametrize(
    ("change", "text"),
    [({"M": -1}, "M is -1; a size is 0 or more"), ({"dtype": 7}, "unknown dtype 7"), ({"y": 0}, "y is null")],
)
def test_bad_arguments_are_errors(emulated, change, text):
    x, w, y, scratch = draw.randn(4, 8), draw.randn(6, 8), torch.empty(4, 6), torch.empty(1 << 20)
    fields = {
        "x": x.data_ptr(), "weight": w.data_ptr(), "bias": 0, "scale": 0, "residual": 0, "y": y.data_ptr(), "preact": 0,
        "M": 4, "N": 6, "K": 8, "x_stride": 8, "weight_stride": 8, "activation": 0, "dtype": 0, "param_dtype": 0,
        "out_dtype": 0, "workspace": scratch.data_ptr(), "workspace_bytes": 4 << 20, "stream": 0, "device": 0,
        "threads": 1, "tf32": False,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=text):
        emulated.module.linear_fwd(*(fields | change).values())


@pytest.mark.parametrize(
    ("numbers", "error", "text"),
    [
        ((1,) * 8, TypeError, "gelu_fwd takes 9 numbers, 8 were given"),
        ((0, 0, 0.5, 1, 0, 0, 0, 1, False), TypeError, "integer"),
        ((0, 0, 0, 1, 0, 0, 1 << 40, 1, False), OverflowError, "1099511627776 does not fit in 32 bits"),
        ((0, 0, 1 << 64, 1, 0, 0, 0, 1, False), OverflowError, "too"),
    ],
)
def test_numbers_that_are_no_fields_are_errors(emulated, numbers, error, text):
    with pytest.raises(error, match=text):
        emulated.module.gelu_fwd(*numbers)


def attention(emulated: Emulated, n: int, d: int = 64, stream: int = 0, device: int = 0) -> None:
    """Runs and checks attention_fwd in bfloat16 on n tokens and one head, by the contract of vit.h."""
    q, k, v = draw.randn(3, n, d, dtype=torch.bfloat16)
    out = torch.empty_like(q)
    strides = (n * d, d, d)  # of a batch, a token and a head
    heads = [number for tensor in (q, k, v) for number in (tensor.data_ptr(), *strides)]
    sizes = (1, n, n, 1, d)  # B, N, L, H, D
    nothing = 0, 0  # no workspace
    bfloat16 = emulated.module.DType.bfloat16
    context = (stream, device, 1, False)
    emulated.module.attention_fwd(*heads, out.data_ptr(), 0, *sizes, d**-0.5, bfloat16, *nothing, *context)
    truth = F.scaled_dot_product_attention(q[None].double(), k[None].double(), v[None].double())[0]
    assert (out.double() - truth).norm() <= 2**-7 * truth.norm()  # a rounding of bfloat16


def test_a_kernel_that_needs_more_shared_memory_than_the_device_has_is_an_error(emulated):
    text = r"attention_fwd: needs 56320 bytes of shared memory per block for B=1 N=300 .* this GPU has 49152: use"
    with pytest.raises(RuntimeError, match=text):
        attention(emulated, 300, d=80, device=3)
    attention(emulated, 300, d=80)


def test_a_failed_launch_is_an_error_of_its_own_call(emulated):
    text = r"attention_fwd: out of memory while launching 1 blocks of 128 threads with .* N=20 L=20 H=1 D=64"
    with pytest.raises(RuntimeError, match=text):
        attention(emulated, 20, stream=1)
    attention(emulated, 20)  # the emulator objects to an error that was left behind


@pytest.mark.parametrize(("device", "text"), [(4, "cannot use device 4: invalid device"), (64, "is not in 0..63")])
def test_a_device_that_does_not_exist_is_an_error(emulated, device, text):
    with pytest.raises(RuntimeError, match=f"attention_fwd: .*{text}"):
        attention(emulated, 20, device=device)


def test_every_device_gets_its_own_permission_for_shared_memory(emulated):
    """More than 48 KiB must be asked for on each device; a call leaves the current device as it found it."""
    for device in (0, 1, 2, 0):
        attention(emulated, 197, device=device)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(
    ("dtype", "d"),
    [
        *(("float32", d) for d in (64, 65, 80, 88, 128, 129, 256)),
        *(("float64", d) for d in (64, 80, 128)),
        ("tf32", 128),
    ],
)
def test_exact_attention_runs_on_every_gpu(emulated, dtype, d, direction):
    """Device 2 has the 99 KiB of shared memory of 8.6, 8.9 and 12.x; the bits are those of device 0."""
    emulated.device = 2
    check(sized("attention", dtype, direction, b=1, n=20, l=20, h=1, d=d))


def sized(op: str, dtype: str, direction: str, **sizes: int) -> Case:
    """A case that is not on the list."""
    tf32 = dtype == "tf32"
    return Case(op, "", tuple(sizes.items()), dtype="float32" if tf32 else dtype, direction=direction, tf32=tf32)


def cuda_record(emulated: Emulated, monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]]) -> Any:
    """vit's own record of the backend, with GPUs of these capabilities and the emulated module in the place of its."""
    module = importlib.import_module("vit.backends.cuda")
    monkeypatch.setattr(module.Cuda, "unavailable", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capabilities[index or 0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: f"GPU {index or 0}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setitem(vars(module.BACKEND), "lib", emulated.module)
    monkeypatch.setitem(vars(module.BACKEND), "exported", emulated.exported)
    monkeypatch.setitem(vars(module.BACKEND), "codes", emulated.codes)
    facts = {"driver": "13.0", "runtime": "13.0", "architectures": "80 90a-real"}
    monkeypatch.setattr(module, "_facts", lambda info: facts)
    return SimpleNamespace(reasons=module.BACKEND.reasons, facts=facts)


def test_shared_memory_is_a_reason(emulated, monkeypatch):
    """What the table says is what a launch of it needs, and what exceeds a device is refused before any launch."""
    record = cuda_record(emulated, monkeypatch, [(9, 0), (9, 0), (8, 6)])

    def reasons(dtype: torch.dtype, d: int, training: bool, index: int) -> list[str]:
        shapes = {"q": ("*", 20, 1, d), "k": ("*", 20, 1, d), "v": ("*", 20, 1, d)}
        return record.reasons(vit.ops.Spec("attention", dtype, shapes, training, {}, "cuda", device_index=index))

    emulated.device = 2
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for d in (1, 64, 80, 128, 129, 256):
            for training in (False, True):
                assert reasons(dtype, d, training, 0) == []
                refused = reasons(dtype, d, training, 2)
                name, direction = str(dtype).removeprefix("torch."), "bwd" if training else "fwd"
                case = sized("attention", name, direction, b=1, n=3, l=3, h=1, d=d)
                if refused:
                    with pytest.raises(RuntimeError, match="bytes of shared memory per block"):
                        check(case)
                elif d in (129, 256):
                    check(case)
                assert bool(refused) == (dtype == torch.float64 and d > 128 and training)
    text = (
        "head dimension 129 in float64 needs 136320 bytes of shared memory per block in the backward, GPU 2 has 101376"
    )
    assert reasons(torch.float64, 129, True, 2) == [text]


@pytest.mark.parametrize(
    ("dtype", "path"),
    [(torch.float32, "automatic"), *((torch.bfloat16, path) for path in PATHS)],
    ids=str,
)
@pytest.mark.parametrize("largest", [30, 300])
def test_errors_at_large_scores_are_those_of_the_unfused_form(emulated, largest, dtype, path):
    emulated.use(path)
    ratios = error_ratios("cuda_emulator", (1, 65, 130, 1, 64), largest, dtype)
    assert max(ratios.values()) <= 1.3, ratios


@pytest.mark.parametrize("scale", [1e-44, 1e-46, 1e-300])
def test_a_scale_that_is_zero_in_float32_gives_the_mean_of_the_values(emulated, scale):
    q, k, v = draw.randn(3, 1, 20, 1, 64, dtype=torch.bfloat16)
    got = vit.ops.attention(q, k, v, scale=scale, backend="cuda_emulator")
    close(got, v.double().mean(1, keepdim=True).expand_as(got), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [64, 63])
@pytest.mark.parametrize("eps", [1e-44, 1e-46, 1e-300])
def test_an_eps_that_is_zero_in_float32_keeps_zeros_finite(emulated, eps, columns, dtype):
    x = torch.zeros(2, columns, dtype=dtype)
    ops = backend_ops("cuda_emulator")
    assert ops.rms_norm(x, eps=eps).equal(x)
    assert ops.layer_norm(x, torch.ones(columns, dtype=dtype), torch.zeros(columns, dtype=dtype), eps=eps).equal(x)


def test_a_device_that_the_process_does_not_use_gets_no_context(emulated):
    """Work on device 1 while device 0 is current: 530 MB of device 0 that nobody asked for."""
    emulated.exported.vit_emulator_reset(0)
    attention(emulated, 20, device=1)
    assert emulated.exported.vit_emulator_contexts() == 0b10
    emulated.exported.vit_emulator_reset(0b01)
    attention(emulated, 20, device=1)
    assert emulated.exported.vit_emulator_contexts() == 0b11
    assert emulated.exported.vit_emulator_device() == 0


def test_errors_do_not_stay_in_the_runtime(emulated):
    """The next call of PyTorch would report them as its own."""
    with pytest.raises(RuntimeError, match="cannot use device 4"):
        attention(emulated, 20, device=4)
    assert emulated.exported.vit_emulator_error() == 0
    assert emulated.exported.vit_cuda_shared_limit(60) == 0
    assert emulated.exported.vit_emulator_error() == 0
    emulated.module.info()
    assert emulated.exported.vit_emulator_error() == 0


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch's switches of TF32 as they are in a new process, and afterwards as they were."""
    # PyTorch's own test functions, which other files here import, forbid the switches when they are imported.
    monkeypatch.setitem(torch.backends.disable_global_flags.__globals__, "__allow_nonbracketed_mutation_flag", True)
    precision = torch.get_float32_matmul_precision()
    owners = [torch.backends.cuda.matmul, torch.backends, torch.backends.cudnn.conv] if NEW_SWITCHES else []
    before = [owner.fp32_precision for owner in owners]
    for owner in owners[:2]:
        owner.fp32_precision = "none"
    yield
    for owner, value in zip(owners, before, strict=True):
        owner.fp32_precision = value
    torch.set_float32_matmul_precision(precision)


#: torch 2.9 brought switches for each backend.
NEW_SWITCHES = hasattr(torch.backends, "fp32_precision")
#: How PyTorch is told: name of the switch, its value, whether products may then be in TF32.
SWITCHES = [
    ("set_float32_matmul_precision", "high", True),
    ("set_float32_matmul_precision", "highest", False),
    ("backends.cuda.matmul.allow_tf32", True, True),
    ("backends.cuda.matmul.fp32_precision", "tf32", True),
    ("backends.cuda.matmul.fp32_precision", "ieee", False),
    ("backends.fp32_precision", "tf32", True),
    ("backends.cudnn.conv.fp32_precision", "ieee", False),
]


@pytest.mark.parametrize(("switch", "value", "allowed"), SWITCHES)
def test_every_switch_of_tf32(emulated, switches, switch, value, allowed):
    *path, name = switch.split(".")
    owner = functools.reduce(getattr, path, torch)
    if name == "fp32_precision" and not NEW_SWITCHES:
        pytest.skip("switches of torch 2.9")
    if path:
        setattr(owner, name, value)
    else:
        getattr(owner, name)(value)
    assert tf32_allowed() == allowed
    a, b = draw.randn(16, 16), draw.randn(16, 16)
    factors = [round_factor(a), round_factor(b)] if allowed else [a, b]
    truth = factors[0].double() @ factors[1].double()
    assert (
        vit.ops.matmul(a, b, backend="cuda_emulator") - truth
    ).norm() < 8 * 2**-23 * truth.norm()  # 16 additions, half a rounding each
    for dtype in ("float32", "tf32"):  # `vit parity` sets what it needs, and leaves the switches as it found them
        check(sized("matmul", dtype, "fwd", m=16, n=16, k=16))
    assert tf32_allowed() == allowed


@pytest.mark.parametrize(
    ("architectures", "capability", "driver", "text"),
    [
        ("80 90a-real", (12, 0), "13.0", None),
        ("80 90a-real", (12, 0), "13.1", None),
        ("80 90a-real", (12, 0), "12.9", "would run these kernels from PTX of CUDA 13.0, newer than the driver's 12.9"),
        ("80 90a-real", (8, 6), "12.9", None),
        ("80 90a-real", (9, 0), "12.9", None),
        ("80 90a-real 120-real", (12, 1), "12.9", None),
        (
            "90a-real",
            (8, 9),
            "13.0",
            "compute capability 8.9 of GPU 0 has no code in this build, which is for 90a-real",
        ),
        ("120", (9, 0), "13.0", "rebuild with -DCMAKE_CUDA_ARCHITECTURES=90"),
        ("86-virtual", (8, 0), "13.0", "has no code in this build"),
    ],
)
def test_a_gpu_without_code_that_its_driver_takes_is_a_reason(
    emulated, monkeypatch, architectures, capability, driver, text
):
    record = cuda_record(emulated, monkeypatch, [capability])
    record.facts.update(architectures=architectures, driver=driver)
    reasons = record.reasons(vit.ops.Spec("gelu", torch.float32, device_type="cuda"))
    assert text in "; ".join(reasons) if text else not reasons


@pytest.mark.parametrize(
    ("architectures", "capability", "driver", "text"),
    [
        ("80 90a-real", (8, 9), "12.9", None),  # made for 8.9 in the place of 8.0
        ("86-real", (8, 9), "12.9", None),
        ("80 90a-real", (9, 0), "12.9", None),
        ("80 90a-real", (12, 0), "13.0", None),
        ("80 90a-real", (12, 0), "12.9", "newer than the driver's 12.9"),
        ("90a-real", (8, 9), "13.0", "has no code in this build"),
        ("80-real", (9, 0), "13.0", "has no code in this build"),
        ("80 90a-real", (8, 7), "13.0", "is below 8.9"),
    ],
)
def test_products_of_e4m3_have_code_of_their_own(emulated, monkeypatch, architectures, capability, driver, text):
    record = cuda_record(emulated, monkeypatch, [capability])
    record.facts.update(architectures=architectures, driver=driver)
    reasons = record.reasons(vit.ops.Spec("linear_fp8", torch.float32, training=False, device_type="cuda"))
    assert text in "; ".join(reasons) if text else not reasons


@pytest.mark.parametrize(
    ("facts", "torch_cuda", "text"),
    [
        ({}, None, "is built without CUDA: install a CUDA build of torch"),
        ({"driver": "none"}, "13.0", "no NVIDIA driver is installed"),
        (
            {"driver": "12.8"},
            "12.8",
            "the driver supports CUDA 12.8, these kernels were built with 13.0: update the driver, or",
        ),
        ({"devices": "0", "error": "no CUDA-capable device"}, "13.0", "no CUDA device is visible"),
    ],
)
def test_what_a_machine_lacks_is_a_reason(monkeypatch, facts, torch_cuda, text):
    """As info() of the compiled module would tell it: no driver, an old one, no device."""
    module = importlib.import_module("vit.backends.cuda")
    found = {"driver": "13.0", "runtime": "13.0", "devices": "1"} | facts
    # In the instance, where a module that was loaded before would be found first.
    monkeypatch.setitem(vars(module.BACKEND), "lib", SimpleNamespace(info=lambda: list(found.items())))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert text in module._look_for_gpu()


def test_a_gpu_that_is_too_old_is_a_reason(emulated, monkeypatch):
    """The GPU of the tensors, not the current one."""
    record = cuda_record(emulated, monkeypatch, [(9, 0), (7, 5)])
    for index, reasons in ((None, []), (0, []), (1, ["compute capability 7.5 of GPU 1 is below 8.0"])):
        spec = vit.ops.Spec("gelu", torch.float32, device_type="cuda", device_index=index)
        assert record.reasons(spec) == reasons
    assert spec_of(OPS["gelu"], {"x": torch.empty(2, device="meta")}).device_index is None
    asked = vit.create("vit_tiny_patch16_224", depth=1, backend="reference").specs(
        torch.device("cuda", 1), torch.float32, True
    )
    assert {(spec.device_type, spec.device_index) for spec in asked} == {("cuda", 1)}


@pytest.mark.sanitizer
@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_no_kernel_reads_or_writes_out_of_bounds(built, path):
    """Device memory, shared memory and the alignment of vectors, by AddressSanitizer and UndefinedBehaviorSanitizer."""
    if cuda_emulator.sanitizer_environment() is None:
        pytest.skip("the compiler has no AddressSanitizer library")
    options = ["--folder", str(built), "--sanitize", "--path", path, "--every", "20"]
    search = os.pathsep.join([str(cuda_emulator.HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": search}
    done = subprocess.run(
        [sys.executable, "-m", "cuda_emulator", *options], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
