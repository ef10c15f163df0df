"""PTX instructions on memories and barriers, as lines of Python that call the machine: part of Program."""

from __future__ import annotations

from .arithmetic import Lines
from .parse import SIZES, Function, Instruction, dtype_name


class Movement:
    def space(self, ins: Instruction) -> str:
        for part in ins.op[1:]:
            if part.split("::")[0] in ("global", "shared", "local", "param", "const"):
                return part
        return "generic"

    def op_ld(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind, space = ins.op[-1], self.space(ins)
        targets = ins.args[0][1] if ins.args[0][0] == "list" else [ins.args[0]]
        base = ins.args[1][1]
        if space.startswith("param"):
            name, offset = base[1], ins.args[1][2]
            if self.number(f, name) is not None:  # a computed place in the parameters of the kernel
                return self.load_lines(f, ins, kind, "generic", targets, S)
            if f.entry and name in self.entry_params(f):
                offset += self.param_offsets[name]
                return [
                    self.write(f, x, kind, S, f"M.parameter({offset + i * SIZES[kind]}, {dtype_name(kind)!r}, {S})")
                    for i, x in enumerate(targets)
                ]
            return [
                self.write(
                    f,
                    x,
                    kind,
                    S,
                    f"M.call_load({f.name!r}, {name!r}, {offset + i * SIZES[kind]}, {dtype_name(kind)!r}, {S})",
                )
                for i, x in enumerate(targets)
            ]
        return self.load_lines(f, ins, kind, space, targets, S)

    def load_lines(self, f: Function, ins: Instruction, kind: str, space: str, targets: list, S: str) -> Lines:
        lines = [f"v = M.load({space!r}, {self.address(f, ins.args[1], 'u64', S)}, {SIZES[kind]}, {len(targets)}, {S})"]
        view = f".view(np.{dtype_name(kind)})"
        return lines + [self.write(f, x, kind, S, f"v[{i}]{view}") for i, x in enumerate(targets) if x[0] != "sink"]

    def op_st(self, f: Function, ins: Instruction, S: str) -> Lines:
        kind, space = ins.op[-1], self.space(ins)
        sources = ins.args[1][1] if ins.args[1][0] == "list" else [ins.args[1]]
        values = [self.read(f, x, "b" + str(8 * SIZES[kind]), S) for x in sources]
        if space.startswith("param"):
            (_, name), offset = ins.args[0][1], ins.args[0][2]
            return [
                f"M.call_store({f.name!r}, {name!r}, {offset + i * SIZES[kind]}, {value}, {SIZES[kind]}, {S})"
                for i, value in enumerate(values)
            ]
        address = self.address(f, ins.args[0], "u64", S)
        return f"M.store({space!r}, {address}, {SIZES[kind]}, ({', '.join(values)},), {S})"

    def op_griddepcontrol(self, f: Function, ins: Instruction, S: str) -> Lines:
        if ins.op[1] not in ("wait", "launch_dependents"):
            raise NotImplementedError(ins.text)
        return f"M.dependency({ins.op[1]!r}, {S})"

    def entry_params(self, f: Function) -> set[str]:
        return {name for name, _, _ in f.params}

    def op_after_call(self, f: Function, ins: Instruction, S: str) -> Lines:
        names = [a for a in ins.args if a[0] == "list"]
        callee = next(a[1] for a in ins.args if a[0] == "name" and a[1] in self.module.functions)
        function = self.module.function(callee)
        if not function.returns:
            return "pass"
        return [
            f"M.call_copy({callee!r}, {name!r}, {f.name!r}, {to[1]!r}, {S})"
            for (name, _, _), to in zip(function.returns, names[0][1], strict=True)
        ]

    def op_cp(self, f: Function, ins: Instruction, S: str) -> Lines:
        if ins.op[:3] == ("cp", "async", "commit_group"):
            return f"M.copy_commit({S})"
        if ins.op[:3] == ("cp", "async", "wait_group"):
            return f"M.copy_wait({ins.args[0][1]}, {S})"
        if ins.op[:3] == ("cp", "async", "wait_all"):
            return f"M.copy_wait(-1, {S})"
        if ins.op[:3] == ("cp", "async", "bulk"):
            return self.tensor_copy(f, ins, S)
        to, source = (self.address(f, x, "u64", S) for x in ins.args[:2])
        size = ins.args[2][1]
        valid = self.read(f, ins.args[3], "u32", S) if len(ins.args) > 3 else str(size)
        return f"M.copy_async({to}, {source}, {size}, {valid}, {S})"

    def tensor_copy(self, f: Function, ins: Instruction, S: str) -> Lines:
        if "tensor" not in ins.op or "3d" not in ins.op or "tile" not in ins.op:
            raise NotImplementedError(ins.text)
        to = self.address(f, ins.args[0], "u64", S)
        tensor, place = ins.args[1][1]
        map_address = self.read(f, tensor, "u64", S)
        coordinates = ", ".join(self.read(f, x, "s32", S) for x in place[1])
        barrier = self.address(f, ins.args[2], "u64", S)
        mask = self.read(f, ins.args[3], "u16", S) if "multicast::cluster" in ins.op else "None"
        return f"M.tensor_load({to}, {map_address}, ({coordinates}), {barrier}, {mask}, {S})"

    def op_bar(self, f: Function, ins: Instruction, S: str) -> Lines:  # arrive
        a, b = (self.read(f, x, "u32", S) for x in ins.args[:2])
        return f"M.bar_arrive({a}, {b}, {S})"

    def op_barrier(self, f: Function, ins: Instruction, S: str) -> Lines:
        if ins.op[1] == "cluster":
            return f"M.cluster_arrive({S})"
        return self.op_bar(f, ins, S)

    def op_mbarrier(self, f: Function, ins: Instruction, S: str) -> Lines:
        what = ins.op[1]
        if what == "init":
            return (
                f"M.mbarrier_init({self.address(f, ins.args[0], 'u64', S)}, {self.read(f, ins.args[1], 'u32', S)}, {S})"
            )
        if what == "arrive":
            at = self.address(f, ins.args[1], "u64", S)
            expect = self.read(f, ins.args[2], "u32", S) if "expect_tx" in ins.op else "0"
            if ins.args[0][0] != "sink":
                raise NotImplementedError("the state of an arrival")
            return f"M.mbarrier_arrive({at}, {expect}, {S})"
        if what == "inval":
            return "pass"
        raise NotImplementedError(ins.text)

    def op_fence(self, f: Function, ins: Instruction, S: str) -> Lines:
        return f"M.fence({ins.op[1:]!r}, {S})"

    def op_membar(self, f: Function, ins: Instruction, S: str) -> Lines:
        return "pass"

    def op_prefetch(self, f: Function, ins: Instruction, S: str) -> Lines:
        return "pass"

    def op_setmaxnreg(self, f: Function, ins: Instruction, S: str) -> Lines:
        return f"M.set_registers({ins.op[1]!r}, {ins.args[0][1]}, {S})"

    def op_mapa(self, f: Function, ins: Instruction, S: str) -> Lines:
        a, b = (self.read(f, x, "u32", S) for x in ins.args[1:3])
        return self.write(f, ins.args[0], "u32", S, f"M.map_address({a}, {b}, {S})")
