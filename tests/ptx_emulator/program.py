"""Turns the instructions of a PTX kernel into Python functions on NumPy arrays, one lane per thread.

A kernel and what it calls become one list of instructions. Between the instructions at which threads part or meet
("stops", run by machine.py) lie segments; each segment is compiled to one Python function of S, the lanes that run it.
U, I and F are the registers as unsigned integers, signed integers and floats, by number; U of a predicate is boolean.
"""

from __future__ import annotations

import numpy as np

from . import values
from .arithmetic import Arithmetic
from .movement import Movement
from .parse import FLOAT, INTEGER, SIGNED, SIZES, Function, Instruction, Module

#: What threads part or meet at.
STOPS = {"bra", "ret", "exit", "call", "shfl", "mma", "ldmatrix", "wgmma", "trap"}

SPECIAL = ("%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid", "%warpid", "%cluster_ctarank", "%cluster_nctarank")


def is_stop(op: tuple[str, ...]) -> bool:
    """Whether machine.py runs the instruction."""
    if op[0] in STOPS:
        return True
    if op[0] in ("bar", "barrier"):
        return "arrive" not in op  # an arrival alone waits for nobody
    if op[0] == "mbarrier":
        return op[1] in ("try_wait", "test_wait")
    return False


class Program(Arithmetic, Movement):
    """A kernel ready to run; `namespace` gets the machine of a launch before each run."""

    def __init__(self, module: Module, entry: str) -> None:
        self.module = module
        self.entry = module.function(entry)
        self.code: list[tuple[Function, Instruction]] = []
        self.start: dict[str, int] = {}
        self.label: dict[tuple[str, str], int] = {}
        self.leaders: set[int] = set()
        self.registers: dict[tuple[str, str], int] = {}
        self.types: list[str] = []
        self.constants: dict[tuple, str] = {}
        self.namespace: dict = dict(vars(values))
        self.segments: dict[int, tuple] = {}  # first instruction -> (function or None, instruction after)
        self.opcodes: dict[str, int] = {}
        self.flatten()
        self.param_offsets, self.param_bytes = layout_of(self.entry.params)

    def flatten(self) -> None:
        """One list of the instructions of the kernel and all it calls; `leaders` are where control may come in."""
        wanted, done = [self.entry.name], set()
        while wanted:
            name = wanted.pop(0)
            if name in done:
                continue
            done.add(name)
            f = self.module.function(name)
            self.start[name] = len(self.code)
            self.leaders.add(len(self.code))
            place = {}
            for i, ins in enumerate(f.code):
                place[i] = len(self.code)
                self.code.append((f, ins))
                if ins.op[0] == "call":
                    names = [a[1] for a in ins.args if a[0] == "name"]
                    callee = next(n for n in names if n in self.module.functions)
                    wanted.append(callee)
                    self.code.append((f, Instruction(("after_call",), ins.args, text="after " + ins.text)))
            place[len(f.code)] = len(self.code)
            for label, i in f.labels.items():
                self.label[name, label] = place[i]
                self.leaders.add(place[i])
            for register, kind in f.registers.items():
                self.registers[name, register] = len(self.types)
                self.types.append(kind)
        self.stop = [is_stop(ins.op) for _, ins in self.code] + [True]

    def constant(self, value: np.generic) -> str:
        """The name of a number in the namespace."""
        key = (value.dtype.str, value.tobytes())
        if key not in self.constants:
            self.constants[key] = f"k{len(self.constants)}"
            self.namespace[self.constants[key]] = value
        return self.constants[key]

    def number(self, f: Function, name: str) -> int | None:
        """The number of a register; None for a variable."""
        return self.registers.get((f.name, name))

    def read(self, f: Function, arg: tuple, kind: str, S: str) -> str:
        """The value of an operand as an array (or a scalar) of the type."""
        size = SIZES[kind]
        if arg[0] == "int":
            value = arg[1]
            if kind == "pred":
                return f"np.bool_({value})"
            if kind[0] == "f":
                return self.constant(np.dtype(FLOAT[size]).type(value))
            wrapped = value & (1 << 8 * size) - 1
            unsigned = np.dtype(INTEGER[size]).type(wrapped)
            return self.constant(unsigned.view(SIGNED[size]) if kind[0] == "s" else unsigned)
        if arg[0] == "float":
            bits = np.dtype(INTEGER[arg[2]]).type(arg[1])
            return self.constant(bits.view(FLOAT[arg[2]]) if kind[0] == "f" else bits)
        if arg[0] == "not":
            return f"~U[{self.number(f, arg[1])}][{S}]"
        if arg[0] != "name":
            raise NotImplementedError(f"operand {arg}")
        name = arg[1]
        number = self.number(f, name)
        if number is None:
            if name.startswith(SPECIAL):
                return f"M.special({name!r})[{S}]" + ("" if size == 4 else f".astype(np.{INTEGER[size]})")
            return f"M.address({f.name!r}, {name!r}, {S})" + ("" if size == 8 else f".astype(np.{INTEGER[size]})")
        if kind == "pred":
            return f"U[{number}][{S}]"
        have = SIZES[self.types[number]]
        if kind[0] == "f" and kind not in ("f16x2",):
            if have != size:
                raise NotImplementedError(f"{kind} from {self.types[number]}")
            return f"F[{number}][{S}]"
        view = "I" if kind[0] == "s" else "U"
        if have == size:
            return f"{view}[{number}][{S}]"
        if have < size:
            raise NotImplementedError(f"{kind} from {self.types[number]} {name}")
        cast = (SIGNED if kind[0] == "s" else INTEGER)[size]
        return f"U[{number}][{S}].astype(np.{cast})"

    def write(self, f: Function, arg: tuple, kind: str, S: str, value: str) -> str:
        """The line that stores a value of the type in a register."""
        if arg[0] == "sink":
            return value
        number = self.number(f, arg[1])
        if kind == "pred":
            return f"U[{number}][{S}] = {value}"
        have, size = SIZES[self.types[number]], SIZES[kind]
        if kind[0] == "f" and kind != "f16x2" and have == size:
            return f"F[{number}][{S}] = {value}"
        if have < size:
            raise NotImplementedError(f"{kind} to {self.types[number]}")
        if have > size:
            value = f"({value}).astype(np.{(SIGNED if kind[0] == 's' else INTEGER)[have]})"
        return f"{'I' if kind[0] == 's' else 'U'}[{number}][{S}] = {value}"

    def address(self, f: Function, arg: tuple, kind: str, S: str) -> str:
        """The address in [..]; kind is u32 or u64."""
        assert arg[0] == "memory", arg
        base = arg[1]
        if base[0] == "name" and self.number(f, base[1]) is not None:
            have = SIZES[self.types[self.number(f, base[1])]]
            text = self.read(f, base, "u32" if have == 4 else "u64", S)
            if have == 4:
                text += ".astype(np.uint64)"
        elif base[0] == "int":
            text = f"M.same({base[1]}, {S})"
        else:
            text = f"M.address({f.name!r}, {base[1]!r}, {S})"
        if arg[2]:
            text = f"({text} + {self.constant(np.uint64(arg[2] & (1 << 64) - 1))})"
        return text

    def segment(self, first: int) -> tuple:
        """The function that runs the instructions from `first` to the next stop or label, and where it ends."""
        if first in self.segments:
            return self.segments[first]
        lines, at = [], first
        while not self.stop[at] and (at == first or at not in self.leaders):
            f, ins = self.code[at]
            lines += self.lines(f, ins)
            at += 1
        function = None
        if lines:
            source = "def run(S):\n" + "\n".join("    " + line for line in lines)
            try:
                exec(compile(source, f"<ptx {self.entry.name} {first}>", "exec"), self.namespace)
            except SyntaxError as error:
                raise RuntimeError(source) from error
            function = self.namespace["run"]
        self.segments[first] = function, at
        return self.segments[first]

    def lines(self, f: Function, ins: Instruction) -> list[str]:
        """An instruction, under its guard."""
        self.opcodes[".".join(ins.op)] = self.opcodes.get(".".join(ins.op), 0) + 1
        try:
            if ins.guard is None:
                return self.translate(f, ins, "S")
            number = self.number(f, ins.guard)
            inverse = "~" if ins.negated else ""
            inner = self.translate(f, ins, "Q")
            return [f"Q = some(S, {inverse}U[{number}][S])", "if Q is not None:", *("    " + line for line in inner)]
        except (NotImplementedError, KeyError, IndexError, AssertionError, TypeError) as error:
            raise NotImplementedError(f"{ins.text}: {error!r}") from error

    def translate(self, f: Function, ins: Instruction, S: str) -> list[str]:
        """An instruction without its guard, by the method of its name."""
        method = getattr(self, "op_" + ins.op[0], None)
        if method is None:
            raise NotImplementedError(ins.op[0])
        result = method(f, ins, S)
        return [result] if isinstance(result, str) else result


def layout_of(params: list[tuple[str, int, int]]) -> tuple[dict[str, int], int]:
    """Where each parameter lies, and the bytes of all."""
    offsets, at = {}, 0
    for name, size, align in params:
        at = (at + align - 1) // align * align
        offsets[name] = at
        at += size
    return offsets, at
