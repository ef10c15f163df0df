"""What ptxas makes of the PTX: registers, stack frames, spills, and what only the machine code shows of setmaxnreg."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from cuda_emulator import run

from . import nvcc


def nvdisasm() -> str | None:
    """CUDA's disassembler, of the toolkit or of triton's wheel; None when there is none."""
    spec = importlib.util.find_spec("triton")
    inside = [f"{folder}/backends/nvidia/bin/nvdisasm" for folder in spec.submodule_search_locations] if spec else []
    return next(filter(None, map(shutil.which, ["nvdisasm", *inside])), None)


@dataclass
class Kernel:
    """The machine code of a kernel; places are numbers of instructions."""

    name: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    code: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def reachable(self, first: int) -> set[int]:
        """What may run after an instruction, itself included."""
        found, wanted = set(), [first]
        while wanted:
            at = wanted.pop()
            if at in found or at >= len(self.code):
                continue
            found.add(at)
            text = self.code[at]
            wanted += [self.labels[label] for label in re.findall(r"`\((\.L_x_\d+)\)", text)]
            always = not text.startswith("@")
            if not (always and re.match(r"(BRA|EXIT|RET|BRX|JMP)\b", text)):
                wanted.append(at + 1)
        return found

    def highest_register(self, places: set[int]) -> int:
        """The highest number of a register that instructions name."""
        return max((int(n) for at in places for n in re.findall(r"\bR(\d+)\b", self.code[at])), default=0)


def kernels(ptx: Path, work: Path) -> list[Kernel]:
    """Assembles a file for the GPU that it is for, and takes it apart again."""
    text = ptx.read_text()
    architecture = re.search(r"\.target (sm_\w+)", text)[1]
    cubin = work / f"{ptx.stem}.cubin"
    command = [nvcc() or "nvcc", f"-arch={architecture}", "-cubin", "-Xptxas=-v", str(ptx), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    found = {kernel.name: kernel for kernel in _disassembled(run([nvdisasm() or "nvdisasm", "-c", str(cubin)]))}
    said = re.compile(
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"(?:ptxas info\s+: Used (\d+) registers)?"
    )
    for name, stack, stores, loads, registers in said.findall(done.stdout + done.stderr):
        if name in found:
            found[name].stack, found[name].spills = int(stack), int(stores) + int(loads)
            found[name].registers = int(registers or 0)
    return list(found.values())


def _disassembled(text: str) -> list[Kernel]:
    found: list[Kernel] = []
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            found.append(Kernel(section[1]))
        elif found and (label := re.match(r"(\.L_x_\d+):", line)):
            found[-1].labels[label[1]] = len(found[-1].code)
        elif found and (instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)):
            found[-1].code.append(instruction[1])
    return found
