"""docs/add-a-backend.md adds a backend of one op: its own steps are applied to a copy of the tree, built and tested."""

from __future__ import annotations

from pathlib import Path

import pages
import pytest

PROGRAM = """
import torch, vit
print(vit.backends()["plain"]["available"], vit.backends()["cpu"]["available"])
try:
    vit.ops.linear(torch.ones(1, 2), torch.ones(3, 2), backend="plain")
except vit.BackendError as error:
    print("its compiled module has no linear_fwd" in str(error))
try:
    vit.ops.gelu(torch.ones(1), "tanh", backend="plain")
except vit.BackendError as error:
    print("approximate is 'tanh'" in str(error))
"""


@pytest.mark.build
@pytest.mark.slow
def test_the_page_adds_a_backend(tmp_path: Path) -> None:
    tree = pages.copy_tree(tmp_path)
    changed = pages.follow("add-a-backend.md", tree)
    assert not changed.edited
    assert {str(Path(path).parent) for path in changed.new} == {"python/vit/backends", "csrc/plain"}
    pages.build(tree, "plain")
    assert pages.python(tree, "-c", PROGRAM).split() == ["True", "False", "True", "True"]
    select = ("--op", "gelu", "--dtype", "float32", "--pattern", "^((?!tanh|quick|silu).)*$")
    assert ", 0 failed, 0 skipped" in pages.python(tree, "-m", "vit", "parity", "--backend", "plain", *select)
