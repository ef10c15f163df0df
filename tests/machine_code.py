"""The machine code of a CUDA module as NVIDIA's own tools show it: what its kernels take, and their instructions."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ptx_emulator import nvcc


def cuobjdump() -> str | None:
    """CUDA's reader of machine code: beside nvcc, on the PATH, or in triton's wheel; None when there is none."""
    compiler, triton = nvcc(), importlib.util.find_spec("triton")
    candidates = ["cuobjdump"] if compiler is None else [str(Path(compiler).with_name("cuobjdump")), "cuobjdump"]
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next(filter(None, map(shutil.which, candidates)), None)


def read(tool: str, module: Path, *options: str, folder: Path | None = None) -> str:
    """What it prints of a module; files it makes are in the folder. It calls nvdisasm, which stands beside it."""
    path = os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])
    command, environment = [tool, *options, str(module.resolve())], os.environ | {"PATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=folder).stdout


@dataclass
class Usage:
    """What a kernel takes: registers of a thread, bytes of its stack frame."""

    architecture: str
    kernel: str
    registers: int
    stack: int


def usages(text: str) -> Iterator[Usage]:
    """Of every kernel and architecture, from `cuobjdump -res-usage`."""
    architecture = ""
    for line in text.splitlines():
        if found := re.match(r"\s*arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            kernel = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+)", line):
            yield Usage(architecture, kernel, int(found[1]), int(found[2]))


@dataclass
class Code:
    """The instructions of a kernel by address, in order."""

    kernel: str
    lines: dict[int, str] = field(default_factory=dict)

    def count(self, pattern: str) -> int:
        """How many match."""
        return sum(bool(re.search(pattern, line)) for line in self.lines.values())

    def reached(self, start: int, ends: str) -> dict[int, str]:
        """Instructions that may run after the one at `start`, up to those that match `ends`."""
        order = list(self.lines)
        following = dict(itertools.pairwise(order))
        seen: set[int] = set()
        left = [following.get(start)]
        while left:
            at = left.pop()
            if at is None or at in seen:
                continue
            seen.add(at)
            line = self.lines[at]
            if re.search(ends, line):
                continue
            left += [int(target, 16) for target in re.findall(r"\b0x[0-9a-f]+\b", line) if JUMPS.search(line)]
            if not re.match(r"BRA 0x|EXIT|RET\b|JMP\b|BRX\b", line):  # a condition stands before or behind the name
                left.append(following.get(at))
        return {at: self.lines[at] for at in sorted(seen) if at in self.lines}


#: Instructions whose operand is a place in the code.
JUMPS = re.compile(r"\b(BRA|BSSY|CALL|JMP|WARPSYNC|BRX)\b")


def codes(text: str) -> Iterator[Code]:
    """Of every kernel, from `cuobjdump -sass`."""
    code = None
    for line in text.splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            if code is not None:
                yield code
            code = Code(found[1])
        elif code is not None and (found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line)):
            code.lines[int(found[1], 16)] = found[2]
    if code is not None:
        yield code


def highest_register(lines: list[str]) -> int:
    """The highest register that the instructions name, or reach by the width of an operand."""
    highest = -1
    for line in lines:
        wide = 3 if ".128" in line else 1 if ".64" in line or ".WIDE" in line else 0
        names = [int(number) for number in re.findall(r"\bR(\d+)\b", line)]
        if found := re.search(r"HGMMA\.64x(\d+)x\d+\S* R(\d+)", line):
            highest = max(highest, int(found[2]) + int(found[1]) // 2 - 1)
            wide = 0
        highest = max([highest, *(number + wide for number in names)])
    return highest
