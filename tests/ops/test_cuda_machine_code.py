"""What ptxas made of the CUDA kernels: stack frames, registers and wgmma in the machine code of the built module.

NVIDIA's tools read it without a GPU; a second for the whole module, ten for the instructions of the kernels of wgmma.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import machine_code
import pytest
from machine_code import Code, Usage

TOOL = machine_code.cuobjdump()
SPEC = importlib.util.find_spec("vit._cuda")
MODULE = Path(SPEC.origin) if SPEC is not None and SPEC.origin is not None else None

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif(MODULE is None, reason="vit._cuda is not built"),
    pytest.mark.skipif(TOOL is None, reason="no cuobjdump beside nvcc, on the PATH or in triton's wheel"),
]


class Limit(NamedTuple):
    """Of the kernels whose names match, on the architectures that match; the first row that matches counts."""

    kernel: str
    architecture: str
    registers: int
    stack: int  # bytes of a thread's frame: spilled registers, and arrays that found no registers
    why: str

    def holds_for(self, usage: Usage) -> bool:
        return bool(re.search(self.kernel, usage.kernel) and re.search(self.architecture, usage.architecture))


LIMITS = (
    Limit("gemm_hopper_kernel", "sm_90a", 168, 0, "of 65,536 for 384 threads; setmaxnreg then deals them out anew"),
    Limit("attention_fwd_hopper_kernel.*Li(32|64|80)ELi(64|128|208)E", "sm_90a", 168, 0, "three blocks of 128 threads"),
    Limit("attention_fwd_hopper_kernel", "sm_90a", 255, 0, "two blocks of 128 threads"),
    Limit("attention_bwd_hopper_kernel.*Li64E", "sm_90a", 128, 0, "two blocks of 256 threads, or one of 512"),
    Limit("attention_bwd_hopper_kernel.*Li(80|96)E", "sm_90a", 168, 0, "one block of 384 threads"),
    Limit("attention_bwd_hopper_kernel.*Li128E", "sm_90a", 255, 0, "one block of 256 threads"),
    Limit("attention_fwd_short_kernel", "sm_80", 128, 40, "two blocks of 256 threads: 8 bytes at D = 64, 40 at 80"),
    Limit("sum_splits", "", 255, 16, "ptxas keeps to 32 registers, for eight blocks of 256 threads, and spills a few"),
    Limit("table_gradientId", "sm_80", 255, 16, "float64, four blocks of 256 threads"),
    Limit("bwd_scalarId", "sm_90", 255, 8, "float64, ptxas keeps to 48 or 64 registers"),
    Limit("", "", 255, 0, "a frame is traffic to memory in every block"),
)


@pytest.fixture(scope="module")
def usages() -> list[Usage]:
    assert TOOL is not None
    assert MODULE is not None
    return list(machine_code.usages(machine_code.read(TOOL, MODULE, "-res-usage")))


@pytest.fixture(scope="module")
def codes(usages: list[Usage], tmp_path_factory: pytest.TempPathFactory) -> list[Code]:
    """The kernels of wgmma, from the parts of the module for 9.0a alone: of all it would take 40 s."""
    assert TOOL is not None
    assert MODULE is not None
    if not any(usage.architecture == "sm_90a" for usage in usages):
        pytest.skip("the module was built without kernels for 9.0a")
    folder = tmp_path_factory.mktemp("machine code")
    machine_code.read(TOOL, MODULE, "-xelf", "sm_90a", folder=folder)
    files = sorted(folder.iterdir())
    assert len(files) == 3  # gemm_hopper.cu, attention_fwd_hopper.cu, attention_bwd_hopper.cu
    return [code for file in files for code in machine_code.codes(machine_code.read(TOOL, file, "-sass"))]


def test_registers_and_stack_frames(usages):
    assert len(usages) > 200
    wrong = []
    for usage in usages:
        limit = next(row for row in LIMITS if row.holds_for(usage))
        if usage.registers > limit.registers or usage.stack > limit.stack:
            wrong.append(f"{usage}: {limit.registers} registers, {limit.stack} bytes: {limit.why}")
    assert not wrong


def test_registers_behind_setmaxnreg(codes):
    """What the producer keeps and the consumers get are all that their code names; more would be another thread's."""
    dealt = [code for code in codes if code.count("USETMAXREG")]
    assert {re.search(r"Li(\d+)ELi(\d+)E", code.kernel).group(1, 2) for code in dealt} == {
        ("128", "192"), ("128", "128"), ("64", "64")
    }  # fmt: skip
    for code in dealt:
        (left,) = (at for at, line in code.lines.items() if "USETMAXREG.DEALLOC" in line)
        (taken,) = (at for at, line in code.lines.items() if "USETMAXREG.TRY_ALLOC" in line)
        kept, given = (int(re.search(r"0x([0-9a-f]+)$", code.lines[at])[1], 16) for at in (left, taken))
        producer = code.reached(left, "USETMAXREG")
        assert not any(re.search(r"\bBRX\b", line) for line in producer.values()), "a jump that cannot be followed"
        assert producer
        others = [line for at, line in code.lines.items() if at not in producer]
        assert machine_code.highest_register(list(producer.values())) < kept, code.kernel
        assert machine_code.highest_register(others) < given, code.kernel


def products(code: Code) -> Counter[str]:
    """The shapes of the wgmma instructions, and how many there are of each."""
    found = [re.search(r"\bHGMMA\.(64x\d+x16)\.", line) for line in code.lines.values()]
    return Counter(match[1] for match in found if match)


def expected(kernel: str) -> tuple[Counter[str], int]:
    """Those that its loops have, and how often a warpgroup's registers are fenced for them."""
    if sizes := re.search(r"gemm_hopper_kernelI.*?Li(\d+)ELi(\d+)E", kernel):
        m, n = map(int, sizes.groups())
        return Counter({f"64x{n}x16": m // 64 * 4}), 1
    if sizes := re.search(r"attention_bwd_hopper_kernelI.*?Li(\d+)E", kernel):
        d = int(sizes[1])  # by keys 2 d / 16 products of 32 queries and twice 2 of d columns, by queries as many and 2
        return Counter({"64x32x16": 4 * d // 16}) + Counter({f"64x{d}x16": 6}), 4
    sizes = re.search(r"attention_fwd_hopper_kernelI.*?Li(\d+)ELi(\d+)E", kernel)
    assert sizes is not None, kernel
    d, keys = map(int, sizes.groups())
    parts = 2 if keys > 256 else 1
    return Counter({f"64x{keys // parts}x16": parts * d // 16}) + Counter({f"64x{d}x16": keys // 16}), 2


def test_products_of_wgmma(codes):
    """As many as the source has for each fence of their registers, also where a loop was unrolled, and as many waits:
    where ptxas finds that it must serialise them, each product is waited for."""
    assert len(codes) > 20
    for code in codes:
        shapes, fences = expected(code.kernel)
        copies = code.count(r"\bWARPGROUP\.ARRIVE\b") // fences
        assert products(code) == Counter({shape: copies * count for shape, count in shapes.items()}), code.kernel
        waits = code.count(r"\bWARPGROUP\.DEPBAR\b")
        assert waits <= copies * fences + (4 if "bwd" in code.kernel else 1), code.kernel


def test_no_fence_of_the_whole_gpu_among_the_products(codes):
    """Barriers have the scope of a block; that of a cluster put one, and an invalidation of L1, into every step."""
    for code in codes:
        places = [at for at, line in code.lines.items() if "HGMMA" in line]
        between = [line for at, line in code.lines.items() if places[0] < at < places[-1]]
        assert not any(re.search(r"MEMBAR\S*(GPU|SYS)|CCTL\.IVALL", line) for line in between), code.kernel


#: Accesses to device memory, also by the accelerator.
DEVICE_MEMORY = r"\b(LDG|STG|LD|ST|LDGSTS|UTMALDG|UBLKCP|RED|REDG|ATOM|ATOMG)\b"


def test_no_device_memory_before_the_wait_for_the_grid_in_front(codes):
    """griddepcontrol.wait is ACQBULK, .launch_dependents PREEXIT; ptxas has moved no load above the first."""
    for code in codes:
        assert code.count(r"\bACQBULK\b") == code.count(r"\bPREEXIT\b") == 1, code.kernel
        before = code.reached(next(iter(code.lines)), r"\bACQBULK\b")
        assert not any(re.search(rf"{DEVICE_MEMORY}|\bPREEXIT\b", line) for line in before.values()), code.kernel
