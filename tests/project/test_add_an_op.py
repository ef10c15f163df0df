"""docs/add-an-op.md adds an op: its own steps are applied to a copy of the tree, which is built and tested."""

from __future__ import annotations

from pathlib import Path

import pages
import pytest

PROGRAM = """
import torch, vit
x = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
for backend in ("reference", "cpu"):
    y = vit.ops.relu2(x, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    print(y.tolist(), dx.tolist())
"""


@pytest.mark.build
@pytest.mark.slow
def test_the_page_adds_an_op(tmp_path: Path) -> None:
    tree = pages.copy_tree(tmp_path)
    changed = pages.follow("add-an-op.md", tree)
    assert (len(changed.new), len(changed.edited)) == (3, 9)
    pages.python(tree, "build_backend/stub.py")
    assert "def relu2_bwd(" in (tree / "python/vit/backends/_native.pyi").read_text()
    pages.build(tree, "cpu", "-DVIT_CPU_BASELINE_ONLY=ON", "-DVIT_CPU_OPTIMIZE=-O0")
    assert pages.python(tree, "-c", PROGRAM) == "[0.0, 0.25, 9.0] [0.0, 1.0, 6.0]\n" * 2
    table = pages.python(tree, "-m", "vit", "parity", "--op", "relu2", "--backend", "cpu")
    assert ", 0 failed, 0 skipped" in table
    options = ("-q", "-p", "no:cacheprovider", "-k", "relu2 and not parity", "tests/ops/test_ops.py")
    assert " passed" in pages.python(tree, "-m", "pytest", *options)
