"""Reads the text of a PTX module: its kernels and functions as lists of instructions, memory declarations by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


class PtxError(RuntimeError):
    """What a kernel does that the PTX ISA does not allow, or promises nothing about."""


#: Bytes of a type; predicates are Python booleans.
SIZES = {"pred": 0, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4}
SIZES |= {"s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16}

#: NumPy's names of them.
INTEGER = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}
SIGNED = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}
FLOAT = {2: "float16", 4: "float32", 8: "float64"}


def dtype_name(kind: str) -> str:
    """NumPy's name of a PTX type."""
    size = SIZES[kind]
    return FLOAT[size] if kind[0] == "f" and kind != "f16x2" else SIGNED[size] if kind[0] == "s" else INTEGER[size]


@dataclass
class Instruction:
    """An instruction; an operand is a tuple whose first entry says what it is (`operand`)."""

    op: tuple[str, ...]  # the parts of the mnemonic
    args: list
    guard: str | None = None  # a predicate register
    negated: bool = False
    text: str = ""


@dataclass
class Function:
    """A kernel, or a function that kernels call."""

    name: str
    entry: bool
    params: list[tuple[str, int, int]]  # name, bytes, alignment
    returns: list[tuple[str, int, int]]
    directives: dict[str, list[int]]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    local: dict[str, tuple[int, int]] = field(default_factory=dict)  # .local arrays: bytes, alignment
    scratch: dict[str, int] = field(default_factory=dict)  # .param arrays of calls: bytes
    tables: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets


@dataclass
class Module:
    """What a file holds. Functions are parsed when they are asked for: few of many are in a run."""

    functions: dict[str, tuple[str, str]]  # name -> header, body (parsed when asked for)
    shared: dict[str, tuple[int, int]]  # module scope .shared: bytes (0: dynamic), alignment
    data: dict[str, tuple[int, int, bytes]]  # module scope .global and .const: bytes, alignment, content
    parsed: dict[str, Function] = field(default_factory=dict)

    def entries(self) -> list[str]:
        """The names of the kernels."""
        return [name for name, (header, _) in self.functions.items() if ".entry" in header]

    def function(self, name: str) -> Function:
        """A kernel or function by its name."""
        if name not in self.parsed:
            self.parsed[name] = parse_function(name, *self.functions[name])
        return self.parsed[name]


def strip_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def split_commas(text: str) -> list[str]:
    """The parts between commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in ")}]":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


HEADER = re.compile(r"((?:\.(?:visible|extern|weak|common)\s+)*)\.(entry|func)\b")


def parse_module(text: str) -> Module:
    """Finds the functions and variables of a file."""
    text = strip_comments(text)
    module = Module({}, {}, {})
    at = 0
    while found := HEADER.search(text, at):
        declare_data(module, text[at : found.start()])
        i = found.end()
        while text[i] not in "{;":
            i += 1
        header = text[found.start() : i]
        if text[i] == ";":  # a declaration
            at = i + 1
            continue
        depth, start = 1, i + 1
        while depth:
            i += 1
            depth += {"{": 1, "}": -1}.get(text[i], 0)
        name, _, _ = header_parts(header)
        module.functions[name] = (header, text[start:i])
        at = i + 1
    declare_data(module, text[at:])
    return module


DATA = re.compile(
    r"\.(shared|global|const)\s+((?:\.(?:align\s+\d+|attribute\([^)]*\))\s*)*)\.(\w+)\s+([\w$]+)\s*"
    r"(?:\[(\d*)\])?\s*(?:=\s*([^;]+))?;"
)


def declare_data(module: Module, text: str) -> None:
    """Notes the variables declared between functions."""
    for space, attributes, kind, name, count, content in DATA.findall(text):
        align = re.search(r"\.align\s+(\d+)", attributes)
        size = SIZES[kind] * (int(count) if count else (0 if space == "shared" else 1))
        if space == "shared":
            module.shared[name] = (size, int(align[1]) if align else SIZES[kind])
            continue
        data = b""
        if content:
            numbers = [int(n.strip(), 0) for n in content.strip().strip("{}").split(",") if n.strip()]
            data = b"".join((n & (1 << 8 * SIZES[kind]) - 1).to_bytes(SIZES[kind], "little") for n in numbers)
        module.data[name] = (size, int(align[1]) if align else SIZES[kind], data.ljust(size, b"\0"))


def header_parts(header: str) -> tuple[str, str, str]:
    """The name of a function, the text of its returned values and of its parameters."""
    rest = header[HEADER.match(header).end() :].strip()
    returns = ""
    if rest.startswith("("):
        end = rest.index(")")
        returns, rest = rest[1:end], rest[end + 1 :].strip()
    name = re.match(r"[\w$]+", rest)[0]
    rest = rest[len(name) :].strip()
    params = rest[1 : rest.index(")")] if rest.startswith("(") else ""
    return name, returns, params


def parse_params(text: str) -> list[tuple[str, int, int]]:
    """Name, bytes and alignment of each parameter."""
    params = []
    for part in split_commas(text):
        words = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?$", part.strip())
        kind = next(k for k in re.findall(r"\.(\w+)", part) if k in SIZES)
        found = re.match(r"\.param\s+(?:\.align\s+(\d+)\s+)?", part.strip())
        align = int(found[1]) if found and found[1] else SIZES[kind]
        params.append((words[1], SIZES[kind] * int(words[2] or 1), align))
    return params


def statements(body: str) -> Iterator[str]:
    """Braces that open and close scopes, labels with their colon, and the text of everything that ends in ;"""
    i, n = 0, len(body)
    while i < n:
        c = body[i]
        if c.isspace():
            i += 1
        elif c in "{}":
            yield c
            i += 1
        else:
            label = re.compile(r"([\w$]+)\s*:(?!:)").match(body, i)
            if label:
                yield label[1] + ":"
                i = label.end()
                continue
            end = body.index(";", i)
            yield " ".join(body[i:end].split())
            i = end + 1


class Scopes:
    """The names of a function's nested braces; a name of an inner one gets the number of its brace."""

    def __init__(self) -> None:
        self.open: list[dict[str, str]] = [{}]
        self.serial = 0

    def enter(self) -> None:
        self.serial += 1
        self.open.append({"": str(self.serial)})

    def leave(self) -> None:
        self.open.pop()

    def declare(self, name: str) -> str:
        """The name in the function of one that the innermost brace declares."""
        if own := self.open[-1].get(""):
            self.open[-1][name] = f"{name}.{own}"
        return self.resolve(name, self.open)

    @staticmethod
    def resolve(name: str, chain: list[dict[str, str]]) -> str:
        return next((scope[name] for scope in reversed(chain) if name in scope), name)


def parse_function(name: str, header: str, body: str) -> Function:
    """Reads the declarations and instructions of a function."""
    _, returns, params = header_parts(header)
    tail = header[header.rindex(")") + 1 :] if ")" in header else ""
    directives = {m[1]: [int(n) for n in re.findall(r"\d+", m[2])] for m in re.finditer(r"\.(\w+)([^.]*)", tail)}
    f = Function(name, ".entry" in header, parse_params(params), parse_params(returns), directives)
    scopes = Scopes()
    pending: list[tuple[Instruction, str, list[dict[str, str]]]] = []
    for st in statements(body):
        if st == "{":
            scopes.enter()
        elif st == "}":
            scopes.leave()
        elif st.endswith(":"):
            f.labels[scopes.declare(st[:-1])] = len(f.code)
        elif st.startswith("."):
            declare(f, st, scopes)
        else:
            f.code.append(Instruction((), [], text=st))
            pending.append((f.code[-1], st, list(scopes.open)))
    for instruction, st, chain in pending:  # labels of a scope may stand behind their use
        fill_instruction(instruction, st, lambda word, chain=chain: Scopes.resolve(word, chain))
    return f


def declare(f: Function, st: str, scopes: Scopes) -> None:
    """Registers, arrays in local memory, parameters of calls."""
    if st.startswith(".reg"):
        kind = re.match(r"\.reg\s*\.(\w+)", st)[1]
        for declared in split_commas(re.sub(r"^\.reg\s*\.\w+", "", st)):
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", declared)
            for register in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [declared]:
                f.registers[scopes.declare(register)] = kind
    elif st.startswith(".local"):
        m = re.match(r"\.local\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", st)
        f.local[m[3]] = (SIZES[m[2]] * int(m[4] or 1), int(m[1] or 1))
    elif st.startswith(".param"):
        ((parameter, size, _),) = parse_params(st)
        f.scratch[scopes.declare(parameter)] = size
    elif not st.startswith((".pragma", ".loc")):
        raise NotImplementedError(st)


def fill_instruction(instruction: Instruction, st: str, resolve: Callable[[str], str]) -> None:
    """Reads the text of an instruction; `resolve` gives a name of its scope the name it has in the function."""
    guard = re.match(r"@(!?)\s*([%\w$]+)\s+", st)
    if guard:
        instruction.guard, instruction.negated = resolve(guard[2]), guard[1] == "!"
        st = st[guard.end() :]
    op = re.match(r"[\w.:]+", st)[0]
    instruction.op = tuple(op.split("."))
    instruction.args = [operand(part, resolve) for part in split_commas(st[len(op) :])]


NUMBER = re.compile(r"[-+]?(0[fFdDxX][0-9a-fA-F]+|\d+)U?")


def operand(text: str, resolve: Callable[[str], str]) -> tuple:
    """An operand: ("name", x), ("int", n), ("float", bits, bytes), ("memory", base, offset), ("list", operands), ..."""
    text = text.strip()
    if text.startswith("{") or text.startswith("("):
        return ("list", [operand(part, resolve) for part in split_commas(text[1:-1])])
    if text.startswith("["):
        inner = text[1:-1].strip()
        if "," in inner:  # a tensor map and coordinates
            return ("tensor", [operand(part, resolve) for part in split_commas(inner)])
        m = re.fullmatch(r"([%\w$]+)\s*(?:\+\s*(-?\w+))?", inner)
        return ("memory", operand(m[1], resolve), int(m[2], 0) if m[2] else 0)
    if "|" in text:
        return ("pair", [operand(part, resolve) for part in text.split("|")])
    if NUMBER.fullmatch(text):
        if text[:2].lower() == "0f":
            return ("float", int(text[2:], 16), 4)
        if text[:2].lower() == "0d":
            return ("float", int(text[2:], 16), 8)
        return ("int", int(text.rstrip("U"), 0))
    if text == "_":
        return ("sink",)
    if text.startswith("!"):
        return ("not", resolve(text[1:].strip()))
    return ("name", resolve(text))
