"""The Mojo backend beyond the list of cases: what its module holds, who is preferred, products of few rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import draw
import pytest
import torch
import vit
from vit.backends import get, records
from vit.parity import cases

BACKEND = get("mojo")
pytestmark = [
    pytest.mark.mojo,
    pytest.mark.skipif(BACKEND.unavailable() is not None, reason=f"mojo: {BACKEND.unavailable()}"),
]


def test_the_module_holds_nothing_of_mojos_run_time_library():
    """An index that is checked, or an abort, would bring it in: -D ASSERT=none and the rules of docs/mojo.md."""
    text = Path(BACKEND.lib.__file__).read_bytes()
    for name in (b"KGEN_CompilerRT", b"AsyncRT", b"MSupport", b"/modular/", b".mojo"):
        assert name not in text, name


def test_the_compiler_and_the_level_are_told():
    record = vit.backends()["mojo"]
    assert record["compiler"].startswith("Mojo 1.2.0")
    assert record["isa"] in record["isa available"].split(", ")
    assert "baseline" in record["isa available"].split(", ")


def test_auto_prefers_the_cpu_backend():
    names = list(records())
    assert names.index("cpu") < names.index("mojo") < names.index("sycl")
    if get("cpu").unavailable() is None:
        assert "mojo" not in vit.create("vit_digits").plan.values()
    assert set(vit.create("vit_digits", backend="mojo").plan.values()) == {"mojo"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (33, 1030), (50, 2051), (16, 4096)])
@pytest.mark.parametrize("threads", [1, 3])
def test_few_rows_are_the_same_chain_of_sums(n, k, dtype, threads):
    """A weight is packed for many rows and not for up to 8: the same bits, epilogue and blocks of k included."""
    torch.set_num_threads(threads)
    x, w, residual = (draw.randn(*shape).to(dtype) for shape in ((23, k), (n, k), (23, n)))
    given = {"bias": draw.randn(n).to(dtype), "scale": draw.randn(n).to(dtype), "activation": "silu", "backend": "mojo"}
    whole = vit.ops.linear(x, w, residual=residual, **given)
    for rows in range(1, 10):
        assert vit.ops.linear(x[:rows], w, residual=residual[:rows], **given).equal(whole[:rows]), f"{rows} rows"


COMPARE = """
import json, torch, vit
from vit.parity import backend_ops, cases
from vit.parity.problems import DEFINITIONS, build
from vit.parity.runner import call

torch.set_num_threads(1)
chosen, different = cases("cpu", groups=["odd", "corner"]), []
for case in chosen:
    got, wanted = (
        call(build(case, "cpu"), lambda tensors: DEFINITIONS[case.op].call(backend_ops(name), case, tensors))
        for name in ("mojo", "cpu")
    )
    for name, x in wanted.items():
        if not torch.allclose(got[name], x, rtol=0, atol=0, equal_nan=True):
            different.append(f"{case.id} {name}")
print(json.dumps([[vit.backends()[name]["isa"] for name in ("mojo", "cpu")], len(chosen), different]))
"""


@pytest.mark.skipif(get("cpu").unavailable() is not None, reason="the cpu backend is not built")
@pytest.mark.parametrize("level", vit.backends()["mojo"].get("isa available", "").split(", "))
def test_results_are_those_of_the_cpu_backend(level):
    """The same bits in every output and gradient, because the order of sums is the same."""
    environment = os.environ | {"VIT_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[level, level], len(cases("cpu", groups=["odd", "corner"])), []]


TRAIN = """
import json, sys, torch, vit
from pathlib import Path
from vit.training import TrainConfig, train

torch.set_num_threads(1)
arch = {"embed_dim": 32, "depth": 2, "num_heads": 2}
for name in ("mojo", "cpu"):
    config = TrainConfig(arch=arch, backend=name, epochs=8, batch_size=64, warmup_epochs=1.0, checkpoint_seconds=1e9)
    test = train(config, out=Path(sys.argv[1], name)).test
    print(json.dumps([test.accuracy, test.loss]), file=sys.stderr)
"""


@pytest.mark.skipif(get("cpu").unavailable() is not None, reason="the cpu backend is not built")
def test_a_training_is_that_of_the_cpu_backend(tmp_path):
    """To the bit, after 160 steps of forward, backward and optimizer."""
    environment = os.environ | {"VIT_CPU_ISA": vit.backends()["mojo"]["isa"], "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TRAIN, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    mojo, cpu = (json.loads(line) for line in done.stderr.splitlines() if line.startswith("["))
    assert mojo == cpu
    assert mojo[0] > 0.25  # of ten classes
