"""Memories of a launch, who may touch what of them, and the copies of cp.async: part of Machine."""

from __future__ import annotations

import bisect
import ctypes
from typing import Any

import numpy as np

from .parse import PtxError
from .values import lanes_of

#: Where shared and local memory begin among generic addresses.
SHARED_WINDOW, LOCAL_WINDOW = np.uint64(1 << 56), np.uint64(1 << 57)
#: Shared memory of a block begins behind what the driver reserves.
RESERVED = 1024


class HostMemory:
    """The process's memory by address, and which parts of it a kernel may touch."""

    BASE = 4096

    def __init__(self) -> None:
        count = 1 << 47
        array = (ctypes.c_ubyte * count).from_address(self.BASE)
        self.bytes = np.frombuffer(array, dtype=np.uint8)
        self.views = {n: self.bytes[: count // n * n].view(f"u{n}") for n in (1, 2, 4, 8)}
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.keep: list = []

    def allow(self, start: int, size: int, keep: Any = None) -> None:
        """Kernels may touch these bytes from now on; parts that overlap become one."""
        if size <= 0:
            return
        end = start + size
        first, last = bisect.bisect_right(self.ends, start), bisect.bisect_left(self.starts, end)
        if first < last:
            start, end = min(start, self.starts[first]), max(end, self.ends[last - 1])
        self.starts[first:last], self.ends[first:last] = [start], [end]
        if keep is not None:
            self.keep.append(keep)

    def clear(self) -> None:
        self.starts, self.ends, self.keep = [], [], []

    def check(self, address: np.ndarray, size: int) -> None:
        """PtxError unless every access of `size` bytes lies in what kernels may touch."""
        low, high = int(address.min()), int(address.max()) + size
        i = bisect.bisect(self.starts, low) - 1
        if i >= 0 and high <= self.ends[i]:
            return
        starts, ends = np.array(self.starts, dtype=np.uint64), np.array(self.ends, dtype=np.uint64)
        at = np.searchsorted(starts, address, side="right") - 1
        outside = (at < 0) | (address + np.uint64(size) > ends[np.maximum(at, 0)])
        if outside.any():
            bad = int(address[outside][0])
            raise PtxError(f"access of {size} bytes at {bad:#x}, outside of every tensor")

    def load(self, address: np.ndarray, size: int) -> np.ndarray:
        return self.views[size][(address - np.uint64(self.BASE)) // np.uint64(size)]


class Memories:
    """The state spaces of a launch."""

    def prepare_memories(self, blocks: int, shared_bytes: int, params: bytes) -> None:
        """Everything begins as NaN; parameters lie aligned, for tensor maps among them."""
        n = self.n
        self.params = np.frombuffer(bytearray(params + bytes(16)), dtype=np.uint8)
        aligned = np.zeros(len(params) + 192, dtype=np.uint8)
        offset = -aligned.ctypes.data % 128
        aligned[offset : offset + len(params)] = self.params[: len(params)]
        self.param_memory, self.param_base = aligned, aligned.ctypes.data + offset
        self.shared_bytes = shared_bytes
        self.stride = RESERVED + (shared_bytes + 1023) // 1024 * 1024
        self.shared = np.full(blocks * self.stride, 0xFF, dtype=np.uint8)
        self.shared_views = {size: self.shared.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.base = (self.block * self.stride).astype(np.uint64)
        # who touched which word since which barrier of the whole block
        words = self.shared.size // 4
        self.epoch = np.ones(blocks, dtype=np.int32)
        self.written, self.read_ = np.zeros(words, dtype=np.int32), np.zeros(words, dtype=np.int32)
        self.writer, self.reader = np.zeros(words, dtype=np.int32), np.zeros(words, dtype=np.int32)
        if static := [name for name, (size, _) in self.program.module.shared.items() if size]:
            raise PtxError(f"static shared memory {static}")
        self.local_offset, at = {}, 0
        for name in self.program.start:
            for array, (size, _) in self.program.module.function(name).local.items():
                at = (at + 15) // 16 * 16
                self.local_offset[name, array] = at
                at += size
        self.local_stride = (at + 31) // 16 * 16
        self.local = np.full(n * self.local_stride, 0xFF, dtype=np.uint8)
        self.local_views = {size: self.local.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.call_memory: dict[tuple[str, str], np.ndarray] = {}
        self.data: dict[str, np.ndarray] = {}
        self.copies: list = []  # of cp.async, under way
        self.copy_group = np.zeros(n, dtype=np.int64)
        self.unfenced = np.zeros(n, dtype=bool)  # threads that have written what the tensor cores may not see yet

    def prepare_dependency(self, overlaps: bool) -> None:
        """Who has waited for the grid in front: all, where it has ended before this one begins."""
        self.overlaps = overlaps
        self.waited = np.full(self.n, not overlaps)

    def dependency(self, what: str, S) -> None:
        """griddepcontrol."""
        if what == "wait":
            self.waited[S] = True
        else:
            self.check_waited(S, "lets the next grid begin")

    def check_waited(self, S, what: str) -> None:
        if self.overlaps and not self.waited[S].all():
            raise PtxError(f"a thread {what} before griddepcontrol.wait")

    def same(self, value, S):
        return np.full(lanes_of(S).size, value, dtype=np.uint64)

    def address(self, function, name, S):
        """Of a variable in its own state space; of a parameter of the kernel, a generic one."""
        if name in self.program.module.shared:
            return self.same(RESERVED, S)
        if (function, name) in self.local_offset:
            return self.same(self.local_offset[function, name], S)
        if name in self.program.param_offsets:
            return self.same(self.param_base + self.program.param_offsets[name], S)
        if name in self.program.module.data:
            if name not in self.data:
                _, _, content = self.program.module.data[name]
                self.data[name] = np.frombuffer(bytearray(content + bytes(16)), dtype=np.uint8)
                self.memory.allow(self.data[name].ctypes.data, len(content), self.data[name])
            return self.same(self.data[name].ctypes.data, S)
        raise PtxError(f"no variable {name}")

    def to_generic(self, value, space, S):
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space.split("::")[0], np.uint64(0))
        return value + window

    def from_generic(self, value, space, S):
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space.split("::")[0], np.uint64(0))
        return value - window

    def parameter(self, offset, dtype, S):
        dtype = np.dtype(dtype)
        return self.params[offset : offset + dtype.itemsize].view(dtype)[0]

    def call_array(self, function, name):
        f = self.program.module.function(function)
        sizes = {n: s for n, s, _ in [*f.params, *f.returns]} | f.scratch
        return self.call_memory.setdefault((function, name), np.zeros((self.n, max(8, sizes[name])), dtype=np.uint8))

    def call_load(self, function, name, offset, dtype, S):
        dtype = np.dtype(dtype)
        array = self.call_array(function, name)
        return np.ascontiguousarray(array[S, offset : offset + dtype.itemsize]).view(dtype)[:, 0]

    def call_store(self, function, name, offset, value, size, S):
        array = self.call_array(function, name)
        n = lanes_of(S).size
        value = np.ascontiguousarray(np.broadcast_to(value, (n,)))
        array[S, offset : offset + size] = value.view(np.uint8).reshape(n, size)

    def call_copy(self, function, name, to_function, to_name, S):
        source, to = self.call_array(function, name), self.call_array(to_function, to_name)
        size = min(source.shape[1], to.shape[1])
        to[S, :size] = source[S, :size]

    def resolve(self, space, address, bytes_, S):
        """The array behind an address and the place in it, checked."""
        if (address & np.uint64(bytes_ - 1)).any():
            raise PtxError(f"misaligned access of {bytes_} bytes in {space} memory")
        if space == "generic":
            kind = address >> np.uint64(56)
            first = int(kind[0])
            if (kind != first).any():
                raise PtxError("threads of one group access different memories")
            if first == 0:
                space = "global"
            elif first == 1:
                space, address = "shared", address - SHARED_WINDOW
            else:
                space, address = "local", address - LOCAL_WINDOW
        if space in ("global", "const"):
            if space == "global" and not self.inside_params(address, bytes_):
                self.check_waited(S, "touches device memory")
                self.memory.check(address, bytes_)
            return self.memory.views, address - np.uint64(self.memory.BASE)
        if space.startswith("shared"):
            if int(address.min()) < RESERVED or int(address.max()) + bytes_ > RESERVED + self.shared_bytes:
                at = int(address.max()) - RESERVED
                raise PtxError(f"access of {bytes_} bytes at {at} of {self.shared_bytes} in shared memory")
            return self.shared_views, address + self.base[S]
        if space == "local":
            if int(address.max()) + bytes_ > self.local_stride:
                raise PtxError("access outside of local memory")
            return self.local_views, address + (lanes_of(S) * self.local_stride).astype(np.uint64)
        raise PtxError(f"memory {space}")

    def inside_params(self, address, bytes_):
        return (
            int(address.min()) >= self.param_base
            and int(address.max()) + bytes_ <= self.param_base + self.program.param_bytes
        )

    def load(self, space, address, size, count, S):
        views, at = self.resolve(space, address, size * count, S)
        place = (at // np.uint64(size)).astype(np.int64)
        if views is self.shared_views:
            lanes = lanes_of(S)
            for i in range(0, size * count, 4):
                self.note_read(lanes, (at.astype(np.int64) + i) >> 2)
        return [views[size][place + i] for i in range(count)]

    def store(self, space, address, size, values, S):
        views, at = self.resolve(space, address, size * len(values), S)
        if views is self.shared_views:
            self.unfenced[S] = True
            lanes = lanes_of(S)
            for i in range(0, size * len(values), 4):
                self.note_write(lanes, (at.astype(np.int64) + i) >> 2)
        place = (at // np.uint64(size)).astype(np.int64)
        for i, value in enumerate(values):
            views[size][place + i] = value

    def note_read(self, lanes, words) -> None:
        epoch, warp = self.epoch[self.block[lanes]], self.warp[lanes]
        if ((self.written[words] == epoch) & (self.writer[words] != warp)).any():
            raise PtxError("a race: a warp reads what another one wrote since the last barrier")
        others = (self.read_[words] == epoch) & (self.reader[words] != warp)
        self.reader[words] = np.where(others, -1, warp)
        self.read_[words] = epoch
        mixed = (self.reader[words] != warp) & ~others
        if mixed.any():
            self.reader[words[mixed]] = -1

    def note_write(self, lanes, words) -> None:
        epoch, warp = self.epoch[self.block[lanes]], self.warp[lanes]
        if ((self.written[words] == epoch) & (self.writer[words] != warp)).any():
            raise PtxError("a race: two warps write one word since the last barrier")
        if ((self.read_[words] == epoch) & (self.reader[words] != warp)).any():
            raise PtxError("a race: a warp overwrites what another one read since the last barrier")
        self.writer[words], self.written[words] = warp, epoch
        if (self.writer[words] != warp).any():
            raise PtxError("a race: two warps write one word at once")

    def copy_async(self, to, source, size, valid, S):
        self.check_waited(S, "copies from device memory")
        lanes = lanes_of(S)
        valid = np.broadcast_to(np.asarray(valid, dtype=np.int64), lanes.shape)
        if (valid > size).any() or size not in (4, 8, 16):
            raise PtxError("cp.async of a wrong size")
        _, place = self.resolve("shared", to, size, S)
        place = place.astype(np.int64)
        if (source & np.uint64(size - 1)).any():
            raise PtxError("cp.async from a misaligned address")
        some_bytes = valid > 0
        if some_bytes.any():
            self.memory.check(source[some_bytes] + (valid[some_bytes] - 1).astype(np.uint64), 1)
            self.memory.check(source[some_bytes], 1)
        for i in range(size // 4):
            self.note_write(lanes, place // 4 + i)
            self.shared_views[4][place // 4 + i] = 0xFFFFFFFF
        self.copies.append((lanes, self.copy_group[lanes].copy(), place, source.copy(), size, valid))

    def copy_commit(self, S):
        self.copy_group[S] += 1

    def copy_wait(self, pending, S):
        """pending -1: everything, committed or not."""
        lanes = lanes_of(S)
        due = np.full(self.n, -1, dtype=np.int64)
        due[lanes] = self.copy_group[lanes] - pending if pending >= 0 else self.copy_group[lanes] + 1
        left = []
        for lanes_, group, place, source, size, valid in self.copies:
            now = group < due[lanes_]
            if now.any():
                self.do_copy(lanes_[now], place[now], source[now], size, valid[now])
                if now.all():
                    continue
                keep = ~now
                lanes_, group, place, source, valid = (x[keep] for x in (lanes_, group, place, source, valid))
            left.append((lanes_, group, place, source, size, valid))
        self.copies = left

    def do_copy(self, lanes, place, source, size, valid):
        self.unfenced[lanes] = True
        for i in range(size // 4):
            self.note_write(lanes, place // 4 + i)
        if (valid == size).all():
            for i in range(size // 4):
                self.shared_views[4][place // 4 + i] = self.memory.load(source + np.uint64(4 * i), 4)
            return
        for i in range(size):
            value = np.zeros(lanes.size, dtype=np.uint8)
            reads = i < valid
            if reads.any():
                value[reads] = self.memory.load(source[reads] + np.uint64(i), 1)
            self.shared[place + i] = value
