"""What threads wait at: barriers of blocks and clusters, mbarriers. Part of Machine."""

from __future__ import annotations

import numpy as np

from .memory import RESERVED
from .parse import PtxError
from .values import lanes_of

#: What a thread does: WAITING for its warp or warpgroup, BLOCKED at a barrier.
RUNNING, WAITING, BLOCKED, DONE = 0, 1, 2, 3


class Barrier:
    """An mbarrier: arrivals per phase, those missing, bytes announced less bytes come, the phase's parity."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = 0
        self.phase = 0


class Barriers:
    """Threads that meet; whoever comes last lets the others go on."""

    def prepare_barriers(self) -> None:
        """Nobody has come to any."""
        self.bars: dict[tuple[int, int], list] = {}  # block and number -> arrivals, who waits, threads wanted
        self.mbarriers: dict[tuple[int, int], Barrier] = {}
        self.mbarrier_waits: list = []
        self.cluster_arrivals = np.zeros(self.n, dtype=np.int64)
        self.cluster_waits: list = []

    def after_exit(self) -> None:
        for key in list(self.bars):
            if self.bars[key][2] == 0:  # of all threads that still live
                self.try_bar(key)
        self.try_cluster()

    def meet_at_bar(self, lanes, pc, f, ins):
        if ins.op[1] == "cluster":  # wait
            self.pc[lanes] = pc + 1
            self.status[lanes] = BLOCKED
            self.cluster_waits.append(lanes)
            self.try_cluster()
            return None, None
        lanes = self.converge(lanes, pc, 32)  # aligned: whole warps
        if lanes is None:
            return None, None
        numbers = self.numbers(f, ins.args[0], lanes) if ins.args else np.zeros(lanes.size, dtype=np.int64)
        counts = self.numbers(f, ins.args[1], lanes) if len(ins.args) > 1 else np.zeros(lanes.size, dtype=np.int64)
        self.pc[lanes] = pc + 1
        self.status[lanes] = BLOCKED
        self.arrive_all(lanes, numbers, counts, True)
        return None, None

    def numbers(self, f, arg, lanes):
        if arg[0] == "int":
            return np.full(lanes.size, arg[1])
        return self.U[self.program.registers[f.name, arg[1]]][lanes].astype(np.int64)

    def arrive_all(self, lanes, numbers, counts, wait) -> None:
        warps = numbers.reshape(-1, 32)
        if (warps != warps[:, :1]).any():
            raise PtxError("threads of one warp give different numbers to a barrier")
        for key in sorted({*zip(self.block[lanes].tolist(), numbers.tolist(), counts.tolist(), strict=True)}):
            mine = lanes[(self.block[lanes] == key[0]) & (numbers == key[1]) & (counts == key[2])]
            self.arrive_bar(*key, mine.size, mine if wait else None)

    def arrive_bar(self, block, number, count, arrivals, waiting) -> None:
        key = (block, number)
        state = self.bars.setdefault(key, [0, [], count])
        if state[2] != count:
            raise PtxError(f"barrier {number} is used with {state[2]} and {count} threads")
        state[0] += arrivals
        if waiting is not None:
            state[1].append(waiting)
        self.try_bar(key)

    def try_bar(self, key) -> None:
        arrived, waiting, count = self.bars[key]
        mine = (self.block == key[0]) & (self.status != DONE)
        wanted = count or np.count_nonzero(mine)
        if arrived > wanted:
            raise PtxError(f"{arrived} threads at barrier {key[1]} of {wanted}")
        if arrived == wanted and arrived:
            del self.bars[key]
            if wanted == np.count_nonzero(mine):
                self.epoch[key[0]] += 1
            for lanes in waiting:
                self.status[lanes] = RUNNING

    def bar_arrive(self, number, count, S) -> None:
        lanes = lanes_of(S)
        numbers, counts = (np.broadcast_to(np.asarray(x, dtype=np.int64), lanes.shape) for x in (number, count))
        self.arrive_all(lanes, numbers, counts, False)

    def cluster_arrive(self, S) -> None:
        self.cluster_arrivals[S] += 1
        self.try_cluster()

    def try_cluster(self) -> None:
        still = []
        for lanes in self.cluster_waits:
            cluster = self.block[lanes] // self.cluster
            done = np.zeros(lanes.size, dtype=bool)
            for c in np.unique(cluster):
                all_lanes = (self.block // self.cluster == c) & (self.status != DONE)
                mine = cluster == c
                done[mine] = self.cluster_arrivals[all_lanes].min() >= self.cluster_arrivals[lanes[mine]]
            self.status[lanes[done]] = RUNNING
            if not done.all():
                still.append(lanes[~done])
        self.cluster_waits = still

    def barrier_key(self, lane, address) -> tuple[int, int]:
        rank = address >> 24
        block = int(self.block[lane])
        if rank:
            block = block // self.cluster * self.cluster + rank - 1
        offset = address & 0xFFFFFF
        if offset % 8 or not RESERVED <= offset < RESERVED + self.shared_bytes:
            raise PtxError("an mbarrier outside of shared memory or misaligned")
        return block, offset

    def mbarrier_init(self, address, count, S):
        lanes = lanes_of(S)
        counts = np.broadcast_to(count, lanes.shape)
        for lane, at, n in zip(lanes.tolist(), address.tolist(), counts.tolist(), strict=True):
            self.mbarriers[self.barrier_key(lane, at)] = Barrier(n)

    def find_barrier(self, key) -> Barrier:
        if key not in self.mbarriers:
            raise PtxError("an mbarrier that was not initialised")
        return self.mbarriers[key]

    def mbarrier_arrive(self, address, expect, S):
        lanes = lanes_of(S)
        expected = np.broadcast_to(expect, lanes.shape).tolist()
        for lane, at, n in zip(lanes.tolist(), address.tolist(), expected, strict=True):
            key = self.barrier_key(lane, at)
            block = key[0]
            if (self.status[self.block == block] == DONE).all():
                raise PtxError("arrival at a block that has ended")
            barrier = self.find_barrier(key)
            if barrier.missing == 0:
                raise PtxError("too many arrivals at an mbarrier")
            barrier.bytes += n
            barrier.missing -= 1
            self.complete_phase(key, barrier)

    def complete_phase(self, key, barrier) -> None:
        if barrier.missing or barrier.bytes:
            return
        barrier.missing = barrier.count
        barrier.phase ^= 1
        still = []
        for k, parity, lanes, predicate in self.mbarrier_waits:
            if k == key and barrier.phase != parity:
                self.status[lanes] = RUNNING
                self.U[predicate][lanes] = True
            else:
                still.append((k, parity, lanes, predicate))
        self.mbarrier_waits = still

    def wait_mbarrier(self, lanes, S, pc, f, ins):
        if ins.op[1:3] != ("try_wait", "parity") or ins.guard:
            raise PtxError(ins.text)
        predicate = self.program.registers[f.name, ins.args[0][1]]
        address = eval(self.program.address(f, ins.args[1], "u64", "S"), self.program.namespace, {"S": S})
        parity = np.broadcast_to(self.value(f, ins.args[2], "u32", S), lanes.shape) & 1
        keys: dict[tuple, list[int]] = {}
        first = address[0] == address[-1] and (address == address[0]).all()
        blocks = self.block[lanes]
        for block in np.unique(blocks).tolist():
            mine = blocks == block
            for at in [address[0]] if first else np.unique(address[mine]):
                here = mine & (address == at)
                for p in np.unique(parity[here]).tolist():
                    keys[self.barrier_key(int(lanes[here][0]), int(at)), p] = lanes[here & (parity == p)]
        self.pc[lanes] = pc + 1
        go_on = []
        for (key, p), some_lanes in keys.items():
            if self.find_barrier(key).phase != p:
                self.U[predicate][some_lanes] = True
                go_on.append(some_lanes)
            else:
                self.status[some_lanes] = BLOCKED
                self.mbarrier_waits.append((key, p, some_lanes, predicate))
        if not go_on:
            return None, None
        return np.sort(np.concatenate(go_on)), pc + 1

    def map_address(self, address, rank, S):
        return (address & np.uint32(0xFFFFFF)) | (np.uint32(rank) + np.uint32(1)) << np.uint32(24)
