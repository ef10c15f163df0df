"""The type stub of the compiled modules says what they hold."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from conftest import NATIVE, USABLE

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "python" / "vit" / "backends" / "_native.pyi"


@pytest.fixture(scope="module")
def stub() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stub", ROOT / "build_backend" / "stub.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stub_is_made_of_the_contract(stub: ModuleType) -> None:
    assert STUB.read_text(encoding="utf-8") == stub.text(), "python build_backend/stub.py makes it anew"


def test_the_shape_of_each_kind_of_field(stub: ModuleType) -> None:
    kinds = stub.structs(
        "struct P {\n  Heads q;  // [N]\n  const void* x;\n  int64_t sizes[6];\n  int64_t M, N;\n};\n"
    )["P"]
    assert kinds == {"q": "Heads", "x": "pointer", "sizes": "int64_t[6]", "M": "int64_t", "N": "int64_t"}
    assert list(stub.parameters(["q", "workspace"], kinds, True)) == [
        "q: int, q_batch: int, q_token: int, q_head: int",
        "workspace: int, workspace_bytes: int",
    ]


@pytest.mark.parametrize("name", USABLE)
def test_a_compiled_module_takes_as_many_numbers(name: str) -> None:
    """A call of one number answers with how many are needed."""
    lib = NATIVE[name].lib
    (protocol,) = (node for node in ast.parse(STUB.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    counts = {f.name: len(f.args.posonlyargs) - 1 for f in protocol.body if isinstance(f, ast.FunctionDef)}
    assert set(lib.fields) <= set(counts)
    for function in lib.fields:
        with pytest.raises(TypeError, match=rf"takes {counts[function]} numbers, 1 were given"):
            getattr(lib, function)(0)
