"""Breaks the PTX of a kernel in one place at a time, which a run must notice.

python -m ptx_emulator.mutations --folder BUILD
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import draw
import torch
import torch.nn.functional as F
import vit
from vit.parity import backend_ops
from vit.parity.problems import Ops

from . import Launches, backend, build

#: A call of a kernel; returns its relative error.
Call = Callable[[Ops], float]


def error(got: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The largest distance between a result and the truth, over the norm of the truth; NaN where one of them is."""
    pairs = zip(got, truth, strict=True)
    return float(torch.stack([(a.detach().double() - b.detach()).norm() / b.detach().norm() for a, b in pairs]).max())


def attention(tokens: int = 70, backward: bool = False, dtype: torch.dtype = torch.bfloat16, d: int = 64) -> Call:
    """Attention of one head."""

    def call(ops: Ops) -> float:
        inputs = [draw.randn(1, tokens, 1, d, dtype=dtype).requires_grad_(backward) for _ in range(3)]
        exact = [t.detach().double().requires_grad_(backward) for t in inputs]
        got = [ops.attention(*inputs)]
        truth = [F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in exact)).transpose(1, 2)]
        if backward:
            dout = draw.randn(1, tokens, 1, d, dtype=dtype)
            got += torch.autograd.grad(got[0], inputs, dout)
            truth += torch.autograd.grad(truth[0], exact, dout.double())
        return error(got, truth)

    return call


def matmul(m: int = 130, n: int = 128, k: int = 200) -> Call:
    """A product with k adjacent in both operands."""

    def call(ops: Ops) -> float:
        a, b = draw.randn(m, k, dtype=torch.bfloat16), draw.randn(n, k, dtype=torch.bfloat16).mT
        return error([ops.matmul(a, b)], [a.double() @ b.double()])

    return call


def linear_gradients(m: int = 130, n: int = 72, k: int = 136) -> Call:
    """Of weight and bias, which one product makes."""

    def call(ops: Ops) -> float:
        x, dy = draw.randn(m, k, dtype=torch.bfloat16), draw.randn(m, n, dtype=torch.bfloat16)
        weight, bias = (draw.randn(*size, dtype=torch.bfloat16).requires_grad_() for size in ((n, k), (n,)))
        got = torch.autograd.grad(ops.linear(x, weight, bias), (weight, bias), dy)
        return error(list(got), [dy.double().mT @ x.double(), dy.double().sum(0)])

    return call


def rms_norm(rows: int = 300, columns: int = 72) -> Call:
    """Forward and backward: the sums of rows, and of columns over rows."""

    def call(ops: Ops) -> float:
        x, w = draw.randn(rows, columns).requires_grad_(), draw.randn(columns).requires_grad_()
        dy = draw.randn(rows, columns)
        exact = [t.detach().double().requires_grad_() for t in (x, w)]
        got, truth = ops.rms_norm(x, w), F.rms_norm(exact[0], (columns,), exact[1], 1e-6)
        return error(
            [got, *torch.autograd.grad(got, (x, w), dy)], [truth, *torch.autograd.grad(truth, exact, dy.double())]
        )

    return call


def linear_fp8(k: int = 1024) -> Call:
    """A large product and many that are lost beside it in a sum of 14 bits."""

    def call(ops: Ops) -> float:
        x, weight = torch.full((1, k), 15.0), torch.ones(1, k)
        x[0, 0] = weight[0, 0] = 448.0
        got = vit.ops.linear_fp8(x, weight.to(torch.float8_e4m3fn), torch.ones(1), backend="ptx_emulator")
        return error([got], [x.double() @ weight.double().T])

    return call


def nth(pattern: str, new: str, i: int) -> Callable[[str], str]:
    """Replaces the i-th place that matches."""

    def change(text: str) -> str:
        found = list(re.finditer(pattern, text))
        m = found[i % len(found)]
        return text[: m.start()] + m.expand(new) + text[m.end() :]

    return change


def every(pattern: str, new: str) -> Callable[[str], str]:
    """Replaces every place that matches."""
    return lambda text: re.sub(pattern, new, text)


class Mutation(NamedTuple):
    """What is broken where, and a call that uses it."""

    what: str
    file: str
    kernel: str  # a part of its name
    change: Callable[[str], str]
    path: str  # a name of PATHS
    call: Call


BAR = r"bar\.sync\s+0;"
FORWARD = ("attention_fwd_mma", "attention_fwd_kernelINS0_4bf16ELi64E")
HOPPER = ("attention_fwd_hopper", "kernelINS0_4bf16ELi64ELi128E")
PRODUCT = ("gemm_hopper", "kernelINS0_4bf16ELi64ELi64ELb1ELb1E")
PORTABLE = ("gemm_mma", "kernelINS0_4bf16ELi64ELb1ELb1E")
WEIGHT_GRADIENT = ("gemm_hopper", "kernelINS0_4bf16ELi128ELi128ELb0ELb0E")
PORTABLE_GRADIENT = ("gemm_mma", "kernelINS0_4bf16ELi64ELb0ELb0E")
#: A product whose b is one register twice: that with ones, which sums rows.
WITH_ONES = r"mma\.sync[^;]*, \{(%r\d+), \1\},[^;]*;"
#: Two rows of a stage that are added to the sums.
TWO_OF_STAGE = r"(ld\.shared\.v4\.u32[^;]*, \[)(%r\d+)(\];[\s\S]*?ld\.shared\.v4\.u32[^;]*, \[)%r\d+"
SHORT = ("attention_bwd_short", "kernelINS0_4bf16E")
WGMMA_BACKWARD = ("attention_bwd_hopper", "kernelINS0_4bf16ELi64E")
SCALAR = ("attention_scalar", "fwd_scalarIfLi128E")
BYTES = ("linear_fp8", "gemm_mma_kernelINS0_4e4m3ELi64ELb1ELb1ENS0_14ScaledEpilogueIfE")
#: A product of e4m3 into registers of its own, and their addition to the sums.
ADDED = r"(e4m3\.f32) \{[^}]*\}, (\{[^}]*\}, \{[^}]*\}), \{[^}]*\};" + 4 * r"\s*add\.f32\s+(%f\d+), %f\d+, %f\d+;"
COLUMNS = ("rms_norm", "weight_columnsIfE")
TRY_WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 done, \[%r\d+\], %r\d+;"
RELEASE = r"mbarrier\.arrive\.shared::cluster\.b64 _, \[remote\];"
GRID_WAIT = r"griddepcontrol\.wait;"
#: The place before the products of a step.
FENCE = r"(?=[^;]*wgmma\.fence)"
WAIT = r"wgmma\.wait_group\.sync\.aligned "

MUTATIONS = [
    Mutation("all barriers removed", *FORWARD, every(BAR, ""), "portable", attention()),
    Mutation("the second barrier removed", *FORWARD, nth(BAR, "", 1), "portable", attention(200)),
    Mutation("waits for one copy less", *FORWARD, every("wait_group 1", "wait_group 2"), "portable", attention(200)),
    Mutation(
        "one ldmatrix not transposed", *FORWARD, nth(r"x4\.trans\.shared", "x4.shared", 0), "portable", attention()
    ),
    Mutation(
        "no fence.proxy.async", *HOPPER, every(r"fence\.proxy\.async\.shared::cta;", ""), "automatic", attention()
    ),
    Mutation("the first wgmma.wait removed", *HOPPER, nth(WAIT + "0;", "", 0), "automatic", attention()),
    Mutation("no wgmma.fence", *HOPPER, every(r"wgmma\.fence\.sync\.aligned;", ""), "automatic", attention()),
    Mutation("the second b not transposed", *HOPPER, every("add, 1, 1, 1;", "add, 1, 1, 0;"), "automatic", attention()),
    Mutation(
        "values not waited for", *HOPPER, nth(r"async\.wait_group 0", "async.wait_group 1", 0), "automatic", attention()
    ),
    Mutation("no wait before a release", *PRODUCT, every(WAIT + "1;", ""), "automatic", matmul(k=1000)),
    Mutation(
        "no waits at mbarriers", *PRODUCT, every(TRY_WAIT, "setp.eq.u32 done, 0, 0;"), "automatic", matmul(k=1000)
    ),
    Mutation(
        "no turns of the warpgroups", *PRODUCT, every(r"bar\.sync %r\d+, %r\d+;", ""), "automatic", matmul(600, k=1000)
    ),
    Mutation("no releases", *PRODUCT, every(RELEASE, ""), "automatic", matmul(k=1000)),
    Mutation("another number of bytes expected", *PRODUCT, every(", 16384;", ", 16320;"), "automatic", matmul(k=1000)),
    Mutation("one k twice", *WEIGHT_GRADIENT, nth(TWO_OF_STAGE, r"\1\2\3\2", 0), "automatic", linear_gradients()),
    Mutation("half of the rows' sums", *PORTABLE_GRADIENT, nth(WITH_ONES, "", 0), "portable", linear_gradients()),
    Mutation("no wait for the grid in front", *PRODUCT, every(GRID_WAIT, ""), "automatic", matmul()),
    Mutation("no wait for the grid in front", *HOPPER, every(GRID_WAIT, ""), "automatic", attention()),
    Mutation(
        "the next grid begins first",
        *HOPPER,
        every(GRID_WAIT + r"([\s\S]*?)(griddep\S+;)", r"\2 griddepcontrol.wait;\1"),
        "automatic",
        attention(),
    ),
    Mutation("the first barrier removed", *PORTABLE, nth(BAR, "", 0), "portable", matmul()),
    Mutation("waits for one copy less", *PORTABLE, every("wait_group 2", "wait_group 3"), "portable", matmul()),
    Mutation(
        "the whole sum in the tensor cores",
        *BYTES,
        every(ADDED, r"\1 {\3, \4, \5, \6}, \2, {\3, \4, \5, \6};"),
        "automatic",
        linear_fp8(),
    ),
    Mutation(
        "one half of b twice",
        *BYTES,
        nth(r"(\{%r\d+, %r\d+, %r\d+, %r\d+\}), \{(%r\d+), %r\d+\}", r"\1, {\2, \2}", 0),
        "automatic",
        linear_fp8(),
    ),
    Mutation("no barrier between v and ds", *SHORT, nth(BAR, "", 1), "automatic", attention(130, True)),
    Mutation("the last barrier removed", *SHORT, nth(BAR, "", -1), "automatic", attention(130, True)),
    *(
        Mutation(what, *WGMMA_BACKWARD, change, "wgmma_backward", attention(70, True))
        for what, change in [
            ("no barrier behind the loads", every(BAR, "")),
            ("the loads not waited for", every(r"async\.wait_group 0", "async.wait_group 1")),
            ("no fence.proxy.async", every(r"fence\.proxy\.async\.shared::cta;", "")),
            ("no wgmma.fence", every(r"wgmma\.fence\.sync\.aligned;", "")),
            ("the scores of keys not waited for", nth(WAIT + "1;", "", 0)),
            ("the scores of queries not waited for", nth(WAIT + "1;", "", 1)),
            ("dp not waited for", nth(WAIT + "0;", "", 0)),
            ("the second b not transposed", every("add, 1, 1, 1;", "add, 1, 1, 0;")),
            ("keys transposed", every("add, 1, 1, 0, 0;", "add, 1, 1, 1, 0;")),
            ("rows of k half as far apart", every(rf"\b{8 << 32}\b", str(4 << 32))),
            ("columns half as far apart", every(rf"\b{8 << 16}\b", str(4 << 16))),
            (
                "the last step not moved back",
                every(r"selp(\.b32\s+%r\d+,) %r\d+, (%r\d+), %p\d+;" + FENCE, r"mov\1 \2;"),
            ),
            ("queries twice", every(r"setp\.lt\.u32(\s+%p\d+), %r\d+, %r\d+;", r"setp.lt.u32\1, 0, 0;")),
            (
                "a part of delta alone",
                nth(r"shfl\.sync\.bfly\.b32\s+(%r\d+)\|%p\d+, (%r\d+),[^;]*;", r"mov.b32 \1, \2;", 0),
            ),
            ("no wait for the grid in front", every(GRID_WAIT, "")),
            ("the next grid begins first", every(GRID_WAIT + r"([\s\S]*?)(griddep\S+;)", r"\2 griddepcontrol.wait;\1")),
        ]
    ),
    Mutation(
        "no barrier behind the loads", *SCALAR, nth(BAR, "", 1), "automatic", attention(40, dtype=torch.float32, d=80)
    ),
    Mutation("no barrier before the sum of warps", *COLUMNS, nth(BAR, "", 0), "automatic", rms_norm()),
]


@contextmanager
def changed(launches: Launches, mutation: Mutation) -> Iterator[None]:
    """While this lasts the kernel is broken."""
    module = launches.modules[mutation.file]
    name = next(name for name in module.entries() if mutation.kernel in name)

    def forget() -> None:
        module.parsed.pop(name, None)
        launches.programs.pop(name, None)

    header, body = module.functions[name]
    module.functions[name] = (header, mutation.change(body))
    assert module.functions[name][1] != body, f"{mutation.what}: nothing was changed"
    forget()
    yield
    module.functions[name] = (header, body)
    forget()


def attempt(launches: Launches, call: Call) -> float | str:
    """The error of a result, or the text of what the emulator objects to."""
    launches.fresh()
    draw.restart()
    try:
        return call(backend_ops("ptx_emulator"))
    except RuntimeError as objection:
        return launches.errors[-1].split("\n")[1] if launches.errors else str(objection)


def noticed(launches: Launches, mutation: Mutation) -> tuple[bool, str]:
    """Whether a run of the broken kernel objects, or is far less exact than the whole one; and what it says."""
    whole = attempt(launches, mutation.call)
    if isinstance(whole, str):
        return False, f"the whole kernel fails: {whole}"
    with changed(launches, mutation):
        broken = attempt(launches, mutation.call)
    if isinstance(broken, str):
        return True, broken
    return not broken < 5 * whole, f"error {broken:.1e}, of the whole kernel {whole:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the module is compiled, and kept")
    args = parser.parse_args()
    missed = 0
    with backend(build(args.folder)) as (record, launches):
        for mutation in MUTATIONS:
            record.use(mutation.path)
            good, text = noticed(launches, mutation)
            missed += not good
            print(f"{'noticed' if good else 'MISSED'}  {mutation.file}: {mutation.what}: {text[:110]}", flush=True)
    print(f"{len(MUTATIONS) - missed} of {len(MUTATIONS)} noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
