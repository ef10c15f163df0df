"""PTX instructions on registers alone, as lines of Python: part of Program."""

from __future__ import annotations

from .parse import SIZES, Function, Instruction

#: One line of Python, or several.
Lines = str | list[str]

COMBINE = {"and": "&", "or": "|", "xor": "^"}
INTEGER_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
INTEGER_COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


class Arithmetic:
    def two(self, f: Function, ins: Instruction, S: str, symbol: str) -> Lines:
        kind = ins.op[-1]
        a, b = (self.read(f, x, kind, S) for x in ins.args[1:3])
        rounding = next((r for r in ins.op if r in ("rm", "rp", "rz")), None)
        if kind[0] == "f" and rounding:
            return self.write(f, ins.args[0], kind, S, f"directed({a}, {b}, {symbol!r}, {rounding!r})")
        value = f"{a} {symbol} {b}"
        if "ftz" in ins.op:
            value = f"flush({value})"
        if "sat" in ins.op:
            value = f"saturate({value})"
        return self.write(f, ins.args[0], kind, S, value)

    def op_add(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.two(f, ins, S, "+")

    def op_sub(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.two(f, ins, S, "-")

    def op_mul(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        if kind[0] == "f":
            return self.two(f, ins, S, "*")
        a, b = (self.read(f, x, kind, S) for x in ins.args[1:3])
        if "wide" in ins.op:
            wide = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[kind]
            return self.write(f, ins.args[0], wide, S, f"wide({a}) * wide({b})")
        if "hi" in ins.op:
            return self.write(f, ins.args[0], kind, S, f"high({a}, {b})")
        return self.write(f, ins.args[0], kind, S, f"{a} * {b}")

    def op_mad(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        if kind[0] == "f":
            return self.op_fma(f, ins, S)
        a, b = (self.read(f, x, kind, S) for x in ins.args[1:3])
        if "wide" in ins.op:
            wide = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[kind]
            c = self.read(f, ins.args[3], wide, S)
            return self.write(f, ins.args[0], wide, S, f"wide({a}) * wide({b}) + {c}")
        c = self.read(f, ins.args[3], kind, S)
        product = f"high({a}, {b})" if "hi" in ins.op else f"{a} * {b}"
        return self.write(f, ins.args[0], kind, S, f"{product} + {c}")

    def op_fma(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        a, b, c = (self.read(f, x, kind, S) for x in ins.args[1:4])
        rounding = next((r for r in ins.op if r in ("rm", "rp", "rz")), "rn")
        value = f"fused({a}, {b}, {c}, {rounding!r})" if rounding != "rn" else f"fused({a}, {b}, {c})"
        if "sat" in ins.op:
            value = f"saturate({value})"
        return self.write(f, ins.args[0], kind, S, value)

    def op_div(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        a, b = (self.read(f, x, kind, S) for x in ins.args[1:3])
        return self.write(f, ins.args[0], kind, S, f"{a} / {b}" if kind[0] == "f" else f"quotient({a}, {b})")

    def op_rem(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        a, b = (self.read(f, x, kind, S) for x in ins.args[1:3])
        return self.write(f, ins.args[0], kind, S, f"remainder({a}, {b})")

    def op_min(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        a, b = (self.read(f, x, kind, S) for x in ins.args[1:3])
        name = "np.minimum" if kind[0] != "f" or "NaN" in ins.op else "np.fmin"
        return self.write(f, ins.args[0], kind, S, f"{name}({a}, {b})")

    def op_max(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        a, b = (self.read(f, x, kind, S) for x in ins.args[1:3])
        name = "np.maximum" if kind[0] != "f" or "NaN" in ins.op else "np.fmax"
        return self.write(f, ins.args[0], kind, S, f"{name}({a}, {b})")

    def one(self, f: Function, ins: Instruction, S: str, template: str) -> Lines:
        kind = ins.op[-1]
        value = template.format(self.read(f, ins.args[1], kind, S))
        if "ftz" in ins.op:
            value = f"flush({value})"
        return self.write(f, ins.args[0], kind, S, value)

    def op_neg(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        return self.one(f, ins, S, "-{}" if kind[0] == "f" else "0 - {}")

    def op_abs(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.one(f, ins, S, "np.abs({})")

    def op_sqrt(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.one(f, ins, S, "np.sqrt({})")

    def op_rsqrt(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.one(f, ins, S, "reciprocal(np.sqrt({}))")

    def op_rcp(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.one(f, ins, S, "reciprocal({})")

    def op_ex2(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.one(f, ins, S, "power({})")

    def op_lg2(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.one(f, ins, S, "np.log2({})")

    def op_not(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.one(f, ins, S, "~({})")

    def bits(self, f: Function, ins: Instruction, S: str, symbol: str) -> Lines:
        kind = ins.op[-1]
        a, b = (self.read(f, x, kind, S) for x in ins.args[1:3])
        return self.write(f, ins.args[0], kind, S, f"{a} {symbol} {b}")

    def op_and(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.bits(f, ins, S, "&")

    def op_or(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.bits(f, ins, S, "|")

    def op_xor(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.bits(f, ins, S, "^")

    def op_shl(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        a = self.read(f, ins.args[1], kind, S)
        if ins.args[2][0] == "int" and ins.args[2][1] < 8 * SIZES[kind]:
            return self.write(f, ins.args[0], kind, S, f"{a} << {ins.args[2][1]}")
        return self.write(f, ins.args[0], kind, S, f"shift_left({a}, {self.read(f, ins.args[2], 'u32', S)})")

    def op_shr(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        a = self.read(f, ins.args[1], kind, S)
        if ins.args[2][0] == "int" and ins.args[2][1] < 8 * SIZES[kind]:
            return self.write(f, ins.args[0], kind, S, f"{a} >> {ins.args[2][1]}")
        return self.write(f, ins.args[0], kind, S, f"shift_right({a}, {self.read(f, ins.args[2], 'u32', S)})")

    def op_shf(self, f: Function, ins: Instruction, S: str) -> Lines:
        low, high, n = (self.read(f, x, "u32", S) for x in ins.args[1:4])
        return self.write(f, ins.args[0], "u32", S, f"funnel({low}, {high}, {n}, {ins.op[1]!r}, {ins.op[2]!r})")

    def op_bfe(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        a, b, c = self.read(f, ins.args[1], kind, S), *(self.read(f, x, "u32", S) for x in ins.args[2:4])
        return self.write(f, ins.args[0], kind, S, f"field({a}, {b}, {c})")

    def op_bfi(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        a, b = (self.read(f, x, kind, S) for x in ins.args[1:3])
        c, d = (self.read(f, x, "u32", S) for x in ins.args[3:5])
        return self.write(f, ins.args[0], kind, S, f"insert({a}, {b}, {c}, {d})")

    def op_prmt(self, f: Function, ins: Instruction, S: str) -> Lines:
        a, b, c = (self.read(f, x, "u32", S) for x in ins.args[1:4])
        return self.write(f, ins.args[0], "u32", S, f"permute({a}, {b}, {c})")

    def op_lop3(self, f: Function, ins: Instruction, S: str) -> Lines:
        a, b, c = (self.read(f, x, "u32", S) for x in ins.args[1:4])
        return self.write(f, ins.args[0], "u32", S, f"lookup({a}, {b}, {c}, {ins.args[4][1]})")

    def op_clz(self, f: Function, ins: Instruction, S: str) -> Lines:
        return self.write(f, ins.args[0], "u32", S, f"leading({self.read(f, ins.args[1], ins.op[-1], S)})")

    def op_copysign(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        a, b = (self.read(f, x, kind, S) for x in ins.args[1:3])
        return self.write(f, ins.args[0], kind, S, f"np.copysign({b}, {a})")

    def op_setp(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        a, b = (self.read(f, x, kind, S) for x in ins.args[1:3])
        value = f"compare({a}, {b}, {ins.op[1]!r})" if kind[0] == "f" else f"({a} {INTEGER_COMPARE[ins.op[1]]} {b})"
        combine = next((c for c in ins.op[2:-1] if c in ("and", "or", "xor")), None)
        if combine:
            other = self.read(f, ins.args[3], "pred", S)
            value = f"({value}) {COMBINE[combine]} ({other})"
        target = ins.args[0]
        if target[0] == "pair":
            raise NotImplementedError("setp of two predicates")
        return self.write(f, target, "pred", S, value)

    def op_selp(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        a, b = (self.read(f, x, kind, S) for x in ins.args[1:3])
        return self.write(f, ins.args[0], kind, S, f"np.where({self.read(f, ins.args[3], 'pred', S)}, {a}, {b})")

    def op_mov(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        to, source = ins.args
        if to[0] == "list":
            part = "b" + str(8 * SIZES[kind] // len(to[1]))
            value = self.read(f, source, kind, S)
            return [
                self.write(f, x, part, S, f"piece({value}, {i}, {len(to[1])})")
                for i, x in enumerate(to[1])
                if x[0] != "sink"
            ]
        if source[0] == "list":
            part = "b" + str(8 * SIZES[kind] // len(source[1]))
            parts = ", ".join(self.read(f, x, part, S) for x in source[1])
            return self.write(f, to, kind, S, f"joined({parts})")
        return self.write(f, to, kind, S, self.read(f, source, kind, S))

    def op_cvt(self, f: Function, ins: Instruction, S: str) -> Lines:
        if ins.op[1:] == ("rn", "satfinite", "e4m3x2", "f32"):
            high, low = (self.read(f, x, "f32", S) for x in ins.args[1:3])
            return self.write(f, ins.args[0], "b16", S, f"joined(to_e4m3({low}), to_e4m3({high}))")
        kinds = [part for part in ins.op[1:] if part in SIZES]
        to, source = kinds[-2], kinds[-1]
        modes = set(ins.op[1:]) - set(kinds)
        if to in ("bf16x2", "f16x2"):
            high, low = (self.read(f, x, "f32", S) for x in ins.args[1:3])
            return self.write(f, ins.args[0], "b32", S, f"packed({low}, {high}, {to!r})")
        value = self.read(f, ins.args[1], "b16" if source in ("bf16", "f16") else source, S)
        target = "b16" if to in ("bf16", "f16") else "b32" if to == "tf32" else to
        return self.write(f, ins.args[0], target, S, f"convert({value}, {to!r}, {source!r}, {sorted(modes)!r})")

    def op_cvta(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind = ins.op[-1]
        space = next(
            part.split("::")[0]
            for part in ins.op
            if part.split("::")[0] in ("global", "shared", "local", "param", "const")
        )
        value = self.read(f, ins.args[1], kind, S)
        how = "from_generic" if "to" in ins.op else "to_generic"
        return self.write(f, ins.args[0], kind, S, f"M.{how}({value}, {space!r}, {S})")
