"""The tensor memory accelerator and wgmma. Part of Machine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .matrices import A16, halves_of
from .memory import RESERVED
from .parse import PtxError
from .values import lanes_of

#: The first word of a tensor map, as runtime.cpp makes them.
MAP_MAGIC = 0x70616D726F736E74


class Hopper:
    """Copies take effect at a random later time, results of wgmma may be read only after the wait."""

    def prepare_hopper(self) -> None:
        """Nothing is under way."""
        self.accelerator: list = []  # copies
        self.products: dict[int, list] = {}  # by warpgroup
        self.commits = 0
        self.flying: dict[int, set[int]] = {}  # registers that products will write, by warpgroup
        self.fenced: dict[int, bool] = {}
        self.granted: dict[int, int] = {}  # registers of a warp

    def tensor_load(self, to, map_address, coordinates, barrier, mask, S):
        self.check_waited(S, "copies from device memory")
        lanes = lanes_of(S)
        for i, lane in enumerate(lanes.tolist()):
            at = int(map_address[i])
            if not (self.param_base <= at and at + 128 <= self.param_base + self.program.param_bytes) or at % 64:
                raise PtxError("a tensor map that is no aligned parameter of the kernel")
            raw = np.frombuffer(self.params.tobytes(), dtype=np.uint64, count=16, offset=at - self.param_base)
            if int(raw[0]) != MAP_MAGIC:
                raise PtxError("no tensor map")
            data, dims, strides = int(raw[1]), [int(x) for x in raw[2:5]], [int(x) for x in raw[5:7]]
            box, size, swizzle = [int(x) for x in raw[7:10]], int(raw[10]), int(raw[11])
            if size != 2 or swizzle != 3 or box[0] * size != 128 or box[2] != 1:
                raise PtxError(f"a tensor map that is not emulated: {raw}")
            place = [int(np.broadcast_to(c, lanes.shape)[i]) for c in coordinates]
            offset = int(to[i])
            if offset >> 24 or offset % 128:
                raise PtxError("the target of a tensor copy")
            own = int(self.block[lane])
            first = own // self.cluster * self.cluster
            ranks = (
                [own - first]
                if mask is None
                else [r for r in range(16) if int(np.broadcast_to(mask, lanes.shape)[i]) >> r & 1]
            )
            key = self.barrier_key(lane, int(barrier[i]))
            for rank in ranks:
                if rank >= self.cluster:
                    raise PtxError("multicast to a block that does not exist")
                self.start_copy(first + rank, offset, data, dims, strides, box, place, key[1])

    def start_copy(self, block, offset, data, dims, strides, box, place, barrier_offset) -> None:
        total = box[0] * box[1] * 2
        if offset < RESERVED or offset + total > RESERVED + self.shared_bytes:
            raise PtxError("a tensor copy outside of shared memory")
        base = block * self.stride
        self.shared[base + offset : base + offset + total] = 0xFF

        def copy() -> None:
            x, y, z = place[0] + np.arange(box[0]), place[1] + np.arange(box[1]), place[2]
            inside = (x >= 0) & (x < dims[0]) & ((y >= 0) & (y < dims[1]))[:, None] & (0 <= z < dims[2])
            address = data + 2 * x + (y * strides[0])[:, None] + z * strides[1]
            content = np.zeros(inside.shape, dtype=np.uint16)
            if inside.any():
                wanted = address[inside].astype(np.uint64)
                self.memory.check(wanted, 2)
                content[inside] = self.memory.load(wanted, 2)
            to = offset + 2 * np.arange(total // 2)
            to ^= (to >> 7 & 7) << 4  # the 128-byte swizzle works on address bits
            self.shared_views[2][(base + to) >> 1] = content.reshape(-1)
            barrier = self.find_barrier((block, barrier_offset))
            barrier.bytes -= total
            self.complete_phase((block, barrier_offset), barrier)

        self.accelerator.append(copy)

    def complete_copy(self) -> None:
        i = self.random.randrange(len(self.accelerator))
        self.accelerator[i], self.accelerator[-1] = self.accelerator[-1], self.accelerator[i]
        self.accelerator.pop()()

    def fence(self, parts, S):
        if parts[0] == "proxy":
            self.unfenced[S] = False

    def set_registers(self, how, count, S):
        if count % 8 or not 24 <= count <= 256:
            raise PtxError(f"setmaxnreg {count}")
        for warp in np.unique(self.warp[S]).tolist():
            self.granted[warp] = count
        for block in np.unique(self.block[S]).tolist():
            warps = [
                self.granted.get(w, 0) for w in range(block * self.threads // 32, (block + 1) * self.threads // 32)
            ]
            if sum(warps) * 32 > 65536:
                raise PtxError(f"{sum(warps) * 32} registers in a block")

    def do_wgmma(self, f, ins, lanes, S):
        what = ins.op[1]
        for group in np.unique(lanes // 128).tolist():
            mine = slice(128 * group, 128 * group + 128)
            if what == "fence":
                self.fenced[group] = True
            elif what == "commit_group":
                self.commits += 1
                for product in self.products.get(group, []):
                    product["commit"] = product["commit"] or self.commits
            elif what == "wait_group":
                self.wait_products(group, ins.args[0][1])
            elif what == "mma_async":
                self.multiply(f, ins, group, mine)
            else:
                raise PtxError(ins.text)

    def wait_products(self, group, pending) -> None:
        products = self.products.get(group, [])
        commits = sorted({p["commit"] for p in products} - {0})
        finished = set(commits[: len(commits) - pending])
        left = []
        for p in products:
            if p["commit"] not in finished:
                left.append(p)
                continue
            for old, read in p["operands"]:
                if not np.array_equal(old, read()):
                    raise PtxError("shared memory changed under a wgmma: " + p["text"])
        self.products[group] = left
        flying = set().union(*(p["registers"] for p in left)) if left else set()
        if flying:
            self.flying[group] = flying
        else:
            self.flying.pop(group, None)
        self.fenced[group] = False

    def check_flying(self, pc, S) -> None:
        """No instruction but a move or another wgmma may read what a wgmma has not finished."""
        lanes = lanes_of(S)
        groups = set(np.unique(lanes // 128).tolist()) & self.flying.keys()
        if not groups:
            return
        flying = set().union(*(self.flying[g] for g in groups))
        at = pc
        while not self.program.stop[at] and (at == pc or at not in self.program.leaders):
            f, ins = self.program.code[at]
            target, sources = (
                {self.program.registers.get((f.name, name)) for _, name in flat(args)}
                for args in (ins.args[:1], ins.args[1:])
            )
            if ins.op[0] == "mov" and sources & flying:
                flying |= target
                for g in groups:
                    self.flying[g] |= target
                    for p in self.products[g]:
                        if p["registers"] & sources:
                            p["registers"] |= target
            elif (sources | (target if ins.op[0] == "st" else set())) & flying:
                raise PtxError("reads what a wgmma has not finished: " + ins.text)
            at += 1

    def descriptor(self, group, value, columns, rows):
        """How to read the [rows, 16] operand of a descriptor. PTX ISA, "Matrix Descriptor Format" and "Strides"."""
        layout, base_offset = value >> 62, value >> 49 & 7
        start, leading, stride = ((value >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        if layout not in (0, 1) or base_offset:
            raise PtxError(f"a descriptor that is not emulated: {value:#x}")
        r, k = np.arange(rows)[:, None], np.arange(16)[None, :]
        if layout == 1:
            if start % 1024 >= 128 and not (columns and start % 128 == 0 and stride == 1024):
                raise PtxError("an operand that does not begin with the swizzle pattern")
            if columns:  # 64 of m or n in a line of 128 bytes, 8 k to a pattern
                at = r // 64 * leading + r % 64 * 2 + k // 8 * stride + k % 8 * 128
            else:
                at = r // 8 * stride + r % 8 * 128 + k * 2
            at = start + at
            at = at ^ (at >> 7 & 7) << 4
        else:  # core matrices of 8 x 16 bytes, leading along k, stride along m or n, whichever is adjacent
            inner = k % 8 * 16 + r % 8 * 2 if columns else r % 8 * 16 + k % 8 * 2
            at = start + r // 8 * stride + k // 8 * leading + inner
        if at.min() < RESERVED or at.max() + 2 > RESERVED + self.shared_bytes:
            raise PtxError("wgmma reads outside of shared memory")
        place = (group * 128 // self.threads * self.stride + at) >> 1
        return lambda: self.shared_views[2][place]

    def multiply(self, f, ins, group, S) -> None:
        shape, d_type, a_type, b_type = ins.op[4:8]
        if not shape.startswith("m64n") or not shape.endswith("k16") or d_type != "f32" or a_type != b_type:
            raise PtxError(ins.text)
        n = int(shape[4:-3])
        d = [self.program.registers[f.name, x[1]] for x in ins.args[0][1]]
        if len(d) != n // 2:
            raise PtxError(ins.text)
        if not self.fenced.get(group):
            raise PtxError("wgmma without wgmma.fence since the last wait: " + ins.text)
        block = group * 128 // self.threads
        if self.unfenced[block * self.threads : (block + 1) * self.threads].any():
            raise PtxError("wgmma reads what was written without fence.proxy.async")
        a, b, scale = ins.args[1:4]
        numbers = [x[1] for x in ins.args[4:]]
        in_registers = a[0] == "list"
        if numbers[:2] != [1, 1] or len(numbers) != (3 if in_registers else 4):
            raise PtxError(ins.text)
        mn_major_b = bool(numbers[-1])
        operands = []

        def shared(arg, columns, rows):
            values = np.unique(self.U[self.program.registers[f.name, arg[1]]][S])
            if values.size != 1:
                raise PtxError("descriptors differ within a warpgroup")
            read = self.descriptor(group, int(values[0]), columns, rows)
            content = read()
            operands.append((content, read))
            return halves_of(np.ascontiguousarray(content), a_type, False)

        if in_registers:
            words = np.stack([self.U[self.program.registers[f.name, x[1]]][S].reshape(4, 32) for x in a[1]], axis=1)
            parts = halves_of(words, a_type)  # [warp, register, lane, half]
            A = parts[:, A16[0], A16[1], A16[2]].reshape(64, 16)
        else:
            A = shared(a, bool(numbers[2]), 64)
        B = shared(b, mn_major_b, n)
        product = (A.astype(np.float64) @ B.astype(np.float64).T).reshape(4, 16, n // 8, 8)
        if scale[0] == "name":
            add = np.unique(self.U[self.program.registers[f.name, scale[1]]][S])
            if add.size != 1:
                raise PtxError("scale-d differs within a warpgroup")
            add = bool(add[0])
        else:
            add = bool(scale[1])
        lane = np.arange(32)
        for i, register in enumerate(d):
            part = product[:, lane // 4 + i % 4 // 2 * 8, i // 4, lane % 4 * 2 + i % 2].reshape(-1)
            if add:
                part = self.F[register][S].astype(np.float64) + part
            self.F[register][S] = part.astype(np.float32)
        entry = {"registers": set(d), "operands": operands, "commit": 0, "text": ins.text[:60]}
        self.products.setdefault(group, []).append(entry)
        self.flying.setdefault(group, set()).update(d)


def flat(args: list) -> Iterator[tuple]:
    """The names in operands."""
    for a in args:
        if a[0] in ("list", "pair", "tensor"):
            yield from flat(a[1])
        elif a[0] == "memory":
            yield a[1]
        elif a[0] == "name":
            yield a
