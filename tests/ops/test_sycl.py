"""The SYCL backend beyond the list of cases: variants for other devices, float16, what is missing, processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import draw
import pytest
import torch
import vit
from test_movement import same_movement
from vit.backends import get, sycl
from vit.ops import Spec
from vit.parity import cases
from vit.parity.runner import backend_ops, run

BACKEND = get("sycl")
pytestmark = [
    pytest.mark.sycl,
    pytest.mark.skipif(BACKEND.unavailable() is not None, reason=f"sycl: {BACKEND.unavailable()}"),
]

#: lanes, sub-groups of a work-group, right operands in local memory, host memory copied
VARIANTS = {
    "lanes32": (32, 1, 0, 0),
    "local": (16, 4, 1, 0),
    "lanes32-local": (32, 2, 1, 0),
    "groups-staged": (16, 4, 0, 1),
}


def force(*variant: int) -> None:
    ctypes.CDLL(sys.modules["vit._sycl"].__file__).vit_sycl_variant(*variant)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    force(*VARIANTS[request.param])
    yield request.param
    force(0, 0, 0, 0)


@pytest.mark.parametrize("op", vit.ops.OPS)
def test_variants_meant_for_gpus_pass_on_the_cpu_device(variant: str, op: str) -> None:
    chosen = cases(ops=[op], groups=["regular", "odd"], dtypes=["float32"])
    results = [run(case, backend_ops("sycl")) for case in chosen]
    assert not [result.text for result in results if not result.ok]
    assert len(results) > 20


@pytest.mark.parametrize("op", vit.ops.OPS)
def test_float16(op: str) -> None:
    chosen = cases("cuda", ops=[op], groups=["odd", "corner"], dtypes=["float16"])
    results = [run(case, backend_ops("sycl")) for case in chosen]
    assert not [result.text for result in results if not result.ok]
    assert len(results) > 20


def test_lanes_change_no_bit_of_a_product() -> None:
    x, weight = draw.randn(50, 130), draw.randn(70, 130)
    want = vit.ops.linear(x, weight, backend="sycl")
    for chosen in VARIANTS.values():
        force(*chosen)
        try:
            assert torch.equal(vit.ops.linear(x, weight, backend="sycl"), want)
        finally:
            force(0, 0, 0, 0)


def test_threads_share_the_queue() -> None:
    inputs = [draw.randn(64, 96) for _ in range(4)]
    want = [vit.ops.linear(x, x, backend="sycl") for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(vit.ops.linear(inputs[i], inputs[i], backend="sycl"), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_movement_on_copies_in_device_memory(dtype: torch.dtype) -> None:
    force(16, 1, 0, 1)
    try:
        same_movement("sycl", dtype)
    finally:
        force(0, 0, 0, 0)


# ----- in processes of their own


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_of_sycl_is_loaded_before_it_is_asked_for() -> None:
    loaded = python(
        "import torch, vit\n"
        "from vit.backends import get\n"
        "vit.create('vit_tiny_patch16_224', backend='reference')\n"
        "vit.ops.gelu(torch.ones(3), backend='reference')\n"
        "spec = vit.ops.Spec('gelu', torch.float32, device_type='cuda')\n"
        "(why,) = get('sycl').reasons(spec)\n"
        "print('needs tensors on cpu or xpu' in why, 'libsycl' in open('/proc/self/maps').read())\n"
    )
    assert loaded.split() == ["True", "False"]


def test_a_missing_runtime_is_a_reason() -> None:
    reason = python("from vit.backends import sycl\nsycl.LIBRARY = 'libsycl.so.0'\nprint(sycl.BACKEND.unavailable())\n")
    assert "libsycl.so.0" in reason
    assert "pip install 'vit-kernels[sycl]'" in reason


def test_a_missing_device_is_a_reason() -> None:
    reason = python("import vit; print(vit.backends()['sycl']['reason'])", ONEAPI_DEVICE_SELECTOR="level_zero:*")
    assert "no SYCL device" in reason or "no usable device" in reason
    assert "intel-opencl-rt" in reason


def test_a_failed_compilation_is_a_reason_with_its_log() -> None:
    text = python(
        "import ctypes, importlib, vit\n"
        "from vit.backends import sycl\n"
        "assert sycl._no_runtime() is None\n"
        "module = importlib.import_module('vit._sycl')\n"
        "ctypes.CDLL(module.__file__).vit_sycl_variant(-1, 1, 0, 0)\n"  # a sub-group of -1 does not compile
        "record = vit.backends()['sycl']\n"
        "print(record['available'], record['reason'], len(record['compiler log']) > 0)\n"
    )
    assert text.startswith("False")
    assert "run-time compiler failed on layer_norm.h" in text
    assert text.rstrip().endswith("True")


def test_forked_workers_after_a_queue_exists() -> None:
    total = python(
        "import torch, vit\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "x = torch.ones(32, 8)\n"
        "y = vit.ops.gelu(x, backend='sycl')\n"
        "loader = DataLoader(TensorDataset(x), batch_size=4, num_workers=2, multiprocessing_context='fork')\n"
        "rows = [vit.ops.gelu(batch, backend='sycl') for (batch,) in loader]\n"
        "print(torch.equal(torch.cat(rows), y))\n"
    )
    assert total.strip() == "True"


def test_queues_of_another_runtime_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec("gelu", torch.float32, {"x": (4,)}, device_type="xpu")
    monkeypatch.setattr(sycl, "_mapped_runtimes", lambda: {"/a/libsycl.so.8.0.0", "/b/libsycl.so.9.0.0"})
    (why,) = BACKEND.reasons(spec)
    assert "one SYCL runtime" in why
    assert "/a/libsycl.so.8.0.0, /b/libsycl.so.9.0.0" in why
    assert BACKEND.default_device().type in ("cpu", "xpu")
