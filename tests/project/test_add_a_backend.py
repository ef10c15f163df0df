"""docs/add-a-backend.md adds a backend of one op: its own steps are applied to a copy of the tree, built and tested."""

from __future__ import annotations

from pathlib import Path

import pages
import pytest

PROGRAM = """
import torch, vit
from vit.backends import get
from vit.ops import Spec
print(vit.backends()["plain"]["available"], vit.backends()["cpu"]["available"])
print(get("plain").reasons(Spec("linear", torch.float32)))
print(get("plain").reasons(Spec("gelu", torch.float64, options={"approximate": "tanh"})))
try:
    vit.ops.linear(torch.ones(1, 2), torch.ones(3, 2), backend="plain")
except vit.BackendError as error:
    print("cannot run 'linear_" in str(error))
"""
TOLD = """\
True False
['its compiled module has no linear_fwd']
['dtype float64 is not one of float32', "approximate is 'tanh', none is computed"]
True
"""


@pytest.mark.build
@pytest.mark.slow
def test_the_page_adds_a_backend(tmp_path: Path) -> None:
    tree = pages.copy_tree(tmp_path)
    changed = pages.follow("add-a-backend.md", tree)
    assert not changed.edited
    assert {str(Path(path).parent) for path in changed.new} == {"python/vit/backends", "csrc/plain"}
    pages.build(tree, "plain")
    assert pages.python(tree, "-c", PROGRAM) == TOLD
    select = ("--op", "gelu", "--dtype", "float32", "--pattern", "^((?!tanh|quick|silu|relu).)*$")
    assert ", 0 failed, 0 skipped" in pages.python(tree, "-m", "vit", "parity", "--backend", "plain", *select)
