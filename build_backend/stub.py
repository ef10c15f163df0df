"""The type stub of the compiled modules, made from csrc/ops.def and csrc/vit.h by `python build_backend/stub.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "python" / "vit" / "backends" / "_native.pyi"

HEAD = """\
# What every compiled module vit._<backend> holds. Made by build_backend/stub.py from csrc/ops.def and csrc/vit.h.
from enum import IntEnum
from typing import Any, Protocol

class Native(Protocol):
    __file__: str
    contract: int
    fields: dict[str, list[str]]
    DType: type[IntEnum]
    Activation: type[IntEnum]
    Pairing: type[IntEnum]

    def info(self) -> list[tuple[str, str]]: ...
    def listen(self) -> None: ...
    def repeats(self, exchange: Any, *of_torch: Any) -> tuple[Any, Any] | None: ...
"""

#: Type of a field in vit.h -> what is added to the field's name for each of its numbers in Python -> the number's type.
KINDS = {
    "pointer": {"": "int"},
    "int64_t": {"": "int"},
    "double": {"": "float"},
    "DType": {"": "int"},
    "Activation": {"": "int"},
    "Pairing": {"": "int"},
    "Matrix": {"": "int", "_batch": "int", "_row": "int", "_col": "int"},
    "Heads": {"": "int", "_batch": "int", "_token": "int", "_head": "int"},
    "View": {"": "int"} | {f"_{d}": "int" for d in range(6)},
    "int64_t[6]": {f"_{d}": "int" for d in range(6)},
}
CONTEXT = "stream: int, device: int, num_threads: int, allow_tf32: bool"


def structs(header: str) -> dict[str, dict[str, str]]:
    """Struct of vit.h -> its fields -> their kinds."""
    found = {}
    for name, base, body in re.findall(r"^struct (\w+)(?: : (\w+))? \{(.*?)\};", header, re.MULTILINE | re.DOTALL):
        kinds = dict(found.get(base, {}))
        for line in re.sub(r"//.*", "", body).split(";"):
            if match := re.fullmatch(r"\s*(?:const )?(\w+)(\*?) (.*)", line, re.DOTALL):
                for field in match[3].split(","):
                    plain, _, size = field.strip().partition("[")
                    kind = "pointer" if match[2] else match[1].removeprefix("Mutable")
                    kinds[plain] = f"{kind}[{size}" if size else kind
        found[name] = kinds
    return found


def parameters(fields: list[str], kinds: dict[str, str], workspace: bool) -> Iterator[str]:
    """The numbers that Python hands over for the fields of a function."""
    for field in fields:
        if field == "context":
            yield CONTEXT
        elif field == "workspace" and workspace:
            yield "workspace: int, workspace_bytes: int"
        else:
            yield ", ".join(f"{field}{more}: {kind}" for more, kind in KINDS[kinds[field]].items())


def text() -> str:
    """The stub."""
    ops = re.sub(r"//.*", "", (ROOT / "csrc" / "ops.def").read_text(encoding="utf-8"))
    found = structs((ROOT / "csrc" / "vit.h").read_text(encoding="utf-8"))
    scratch = set(re.findall(r"^VIT_(?:ROUTINE_)?WORKSPACE\((\w+),", ops, re.MULTILINE))
    lines = [HEAD]
    for name, struct, fields in re.findall(
        r"^VIT_(?:OP|(?:INTEGER_)?ROUTINE)\((\w+), (\w+),([^)]*)\)", ops, re.MULTILINE
    ):
        given = ", ".join(parameters(fields.replace(",", " ").split(), found[struct], name in scratch))
        answer = "int | None" if name in scratch else "None"
        lines.append(f"    def {name}(\n        self, {given}, /\n    ) -> {answer}: ...  # fmt: skip\n")
    return "".join(lines)


if __name__ == "__main__":
    STUB.write_text(text(), encoding="utf-8")
