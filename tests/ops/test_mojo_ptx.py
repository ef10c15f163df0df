"""Kernels in Mojo for NVIDIA GPUs without a GPU: the interpreter runs the PTX that the compiler makes of them.

`pytest -m ptx tests/ops/test_mojo_ptx.py`, with the packages that docs/mojo.md names.
"""

from __future__ import annotations

import functools
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_emulator import CSRC
from mojo_compiler import mojo
from ptx_emulator.machine import Machine
from ptx_emulator.memory import HostMemory
from ptx_emulator.parse import parse_module
from ptx_emulator.program import Program
from torch import Tensor
from vit.parity import cases, run

DTYPES = {torch.float32: "VIT_FLOAT32", torch.float64: "VIT_FLOAT64", torch.bfloat16: "VIT_BFLOAT16"}
#: As vit::Activation counts.
ACTIVATIONS = {"none": 1, "tanh": 2, "quick": 3, "silu": 4, "relu": 5}


def compile_to_ptx(source: Path, target: Path, architecture: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [mojo() or "mojo", "build", "-j", "1", "--emit", "asm", "--Werror", "-D", "ASSERT=none", *options]
    command += ["--target-triple", "nvptx64-nvidia-cuda", "--target-cpu", architecture, "-I", str(CSRC / "mojo")]
    environment = os.environ | {"MODULAR_TELEMETRY_ENABLED": "0", "MODULAR_CACHE_DIR": str(target.parent / "cache")}
    command += ["-o", str(target), str(source)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def lacking(folder: Path) -> str | None:
    """Why there can be no PTX here, in the words of the compiler."""
    (folder / "nothing.mojo").write_text('@export("nothing")\ndef nothing() abi("C"):\n    pass\n')
    try:
        done = compile_to_ptx(folder / "nothing.mojo", folder / "nothing.ptx", "sm_80")
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else None


pytestmark = [pytest.mark.ptx, pytest.mark.mojo, pytest.mark.slow]


class Kernels:
    """gpu.mojo compiled for one architecture."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.programs: dict[tuple[torch.dtype, str], Program] = {}
        self.text: dict[torch.dtype, str] = {}
        for dtype, defined in DTYPES.items():
            target = folder / f"{defined}.ptx"
            done = compile_to_ptx(CSRC / "mojo/gpu.mojo", target, architecture, "-D", defined)
            assert done.returncode == 0, done.stderr
            text = self.text[dtype] = target.read_text()
            assert f".target {architecture}\n" in text
            module = parse_module(text)
            self.programs |= {(dtype, name): Program(module, name) for name in module.entries()}

    def launch(
        self, dtype: torch.dtype, name: str, threads: int, *args: Tensor | float | None, block: int = 64
    ) -> None:
        """At least as many threads; nothing but the tensors may be touched."""
        program, memory = self.programs[dtype, name], HostMemory()
        params = bytearray(program.param_bytes)
        for (param, size, _), arg in zip(program.entry.params, args, strict=True):
            if isinstance(arg, Tensor):
                assert arg.is_contiguous()
                memory.allow(arg.data_ptr(), arg.numel() * arg.element_size())
            value = arg.data_ptr() if isinstance(arg, Tensor) else 0 if arg is None else arg
            at = program.param_offsets[param]
            params[at : at + size] = struct.pack("<d" if isinstance(value, float) else {4: "<i", 8: "<q"}[size], value)
        if threads:
            Machine(program, memory).launch(-(-threads // block), block, 0, 1, bytes(params), lanes=4096)


def make_ops(kernels: Kernels) -> SimpleNamespace:
    """The ops as functions of vit.ops; tensors of other layouts are copied first."""

    def vectors(x: Tensor, count: int) -> int:
        return -(-count // (16 // max(4, x.element_size())))

    class Gelu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, activation):
            ctx.save_for_backward(x := x.contiguous())
            ctx.activation, y = activation, torch.full_like(x, torch.nan)
            kernels.launch(x.dtype, "vit_gelu_fwd", vectors(x, x.numel()), x, y, x.numel(), activation)
            return y

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            dx = torch.full_like(x, torch.nan)
            given = (dy.contiguous(), x, dx, x.numel(), ctx.activation)
            kernels.launch(x.dtype, "vit_gelu_bwd", vectors(x, x.numel()), *given)
            return dx, None

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, eps):
            x = x.contiguous()
            weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
            C, M = x.shape[-1], x.shape[:-1].numel()
            y, moments = torch.full_like(x, torch.nan), x.new_full((2, M), torch.nan, dtype=accumulator(x))
            kernels.launch(x.dtype, "vit_layer_norm_fwd", 32 * M, x, weight, bias, y, *moments, M, C, eps)
            ctx.save_for_backward(x, weight, bias, *moments)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, bias, mean, rstd = ctx.saved_tensors
            C, M = x.shape[-1], x.shape[:-1].numel()
            blocks = -(-M // max(16, -(-M // 128) + 3 & ~3))
            partial = x.new_full((blocks, 2, C), torch.nan, dtype=accumulator(x))
            dx, sums = torch.full_like(x, torch.nan), x.new_full((2, C), torch.nan)
            given = (dy.contiguous(), x, weight, mean, rstd, dx, partial, M, C)
            kernels.launch(x.dtype, "vit_layer_norm_bwd", blocks, *given)
            kernels.launch(x.dtype, "vit_layer_norm_bwd_sums", vectors(x, C), partial, *sums, M, C)
            return dx, None if weight is None else sums[0], None if bias is None else sums[1], None

    def product(a: Tensor, b: Tensor) -> Tensor:
        """a b^T of each of a batch."""
        shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a, b = (x.expand(*shape, *x.shape[-2:]).contiguous() for x in (a, b))
        (M, K), N = a.shape[-2:], b.shape[-2]
        c, warps = a.new_full((*shape, M, N), torch.nan), -(-M // 16) * -(-N // 64)
        for one in zip(*(x.view(shape.numel(), *x.shape[-2:]) for x in (a, b, c)), strict=True):
            kernels.launch(a.dtype, "vit_matmul_bf16", 32 * warps, *one, M, N, K, block=32)
        return c

    class Matmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return product(a, b.mT)

        @staticmethod
        def backward(ctx, dy):
            a, b = ctx.saved_tensors
            return product(dy, b).sum_to_size(a.shape), product(a.mT, dy.mT).sum_to_size(b.shape)

    return SimpleNamespace(
        gelu=lambda x, approximate="none": Gelu.apply(x, ACTIVATIONS[approximate]),
        layer_norm=lambda x, weight=None, bias=None, eps=1e-6: LayerNorm.apply(x, weight, bias, eps),
        matmul=Matmul.apply,
    )


def accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kernels]:
    """By architecture, each compiled once."""
    if why := lacking(tmp_path_factory.mktemp("nothing")):
        pytest.skip(why)
    return functools.cache(lambda architecture: Kernels(tmp_path_factory.mktemp(architecture), architecture))


#: A compilation has one type for activations and parameters; tensor cores take bfloat16.
CASES = [
    case
    for case in cases("cpu", ops=["gelu", "layer_norm", "matmul"], groups=["odd", "corner"])
    if "param_" not in case.id and (case.op != "matmul" or case.dtype == "bfloat16")
]


@pytest.mark.parametrize(
    ("architecture", "case"),
    # The second one gives the same instructions: a part of the cases shows that it is accepted.
    [("sm_80", case) for case in CASES] + [("sm_90a", case) for case in CASES[::20]],
    ids=lambda value: getattr(value, "id", value),
)
def test_parity(kernels, architecture, case):
    result = run(case, make_ops(kernels(architecture)))
    assert result.ok, result.text


def test_the_tensor_cores_are_taken(kernels):
    text = kernels("sm_90a").text[torch.bfloat16]
    assert text.count("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == 8
