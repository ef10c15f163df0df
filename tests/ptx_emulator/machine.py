"""Runs a compiled PTX kernel: the threads of some blocks as lanes of arrays, their memories, and what they meet at.

What the machine promises nothing about, it makes visible: shared memory begins as NaN, the target of an asynchronous
copy is NaN until the copy is waited for, results of wgmma may not be read before the wait, operands in shared memory
may not change meanwhile. Where a kernel may begin before the one in front of it has ended, no thread may touch device
memory, let the next one begin, or end, before griddepcontrol.wait. Accesses outside what was handed over, and
misaligned ones, are errors; so is a block that can make no progress.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from .barriers import DONE, RUNNING, WAITING, Barriers
from .hopper import Hopper
from .matrices import Matrices
from .memory import HostMemory, Memories
from .parse import SIZES, Function, Instruction, PtxError
from .program import Program
from .values import pack_lanes


class Machine(Barriers, Hopper, Matrices, Memories):
    """A launch of a kernel, some of its blocks at a time.

    seed: warps take turns in a random order, one block or cluster after the other; None: all go on together.
    """

    def __init__(self, program: Program, memory: HostMemory, seed: int | None = None) -> None:
        self.program, self.memory = program, memory
        self.random = random.Random(seed if seed is not None else 1)
        self.shuffle = seed is not None
        self.executed = 0

    def launch(
        self,
        grid: int,
        threads: int,
        shared_bytes: int,
        cluster: int,
        params: bytes,
        lanes: int,
        overlaps: bool = False,
    ) -> None:
        """Runs all blocks, about `lanes` threads at once. overlaps: the grid in front may not have ended yet."""
        if len(params) != self.program.param_bytes:
            raise PtxError(f"{len(params)} bytes of parameters, {self.program.param_bytes} expected")
        most = self.program.entry.directives.get("maxntid")
        if most and threads > np.prod(most):
            raise PtxError(f"{threads} threads, .maxntid {most}")
        if grid % cluster or threads % 32:
            raise PtxError(f"grid {grid}, cluster {cluster}, threads {threads}")
        at_once = cluster if self.shuffle else max(cluster, lanes // threads // cluster * cluster)
        self.threads, self.cluster = threads, cluster
        for first in range(0, grid, at_once):
            blocks = min(at_once, grid - first)
            self.prepare_threads(first, blocks, grid)
            self.prepare_memories(blocks, shared_bytes, params)
            self.prepare_dependency(overlaps)
            self.prepare_barriers()
            self.prepare_hopper()
            with np.errstate(all="ignore"):
                self.run()

    def prepare_threads(self, first: int, blocks: int, grid: int) -> None:
        """Places and registers of the threads of some blocks."""
        n, threads, cluster = blocks * self.threads, self.threads, self.cluster
        lane = np.arange(n)
        self.n, self.block, self.warp = n, lane // threads, lane // 32
        self.pc = np.zeros(n, dtype=np.int64)
        self.status = np.zeros(n, dtype=np.int8)
        self.returns: dict[str, np.ndarray] = {}

        def same(x: Any) -> np.ndarray:
            return np.broadcast_to(np.asarray(x, dtype=np.uint32), (n,))

        index = first + self.block
        self.specials = {"%tid.x": same(lane % threads), "%ntid.x": same(threads), "%ctaid.x": same(index)}
        self.specials |= {"%nctaid.x": same(grid), "%laneid": same(lane % 32), "%warpid": same(lane % threads // 32)}
        self.specials |= {"%cluster_ctarank": same(index % cluster), "%cluster_nctarank": same(cluster)}
        for axis in "yz":
            self.specials |= {f"%{name}.{axis}": same(0) for name in ("tid", "ctaid")}
            self.specials |= {f"%{name}.{axis}": same(1) for name in ("ntid", "nctaid")}
        self.U, self.I, self.F = [], [], []
        for kind in self.program.types:
            if kind == "pred":
                self.U.append(np.zeros(n, dtype=bool))
                self.I.append(None)
                self.F.append(None)
                continue
            size = SIZES[kind]
            register = np.full(n * size, 0xFF, dtype=np.uint8)
            self.U.append(register.view(f"u{size}"))
            self.I.append(register.view(f"i{size}"))
            self.F.append(register.view(f"f{size}") if size > 1 else None)
        self.program.namespace.update(U=self.U, I=self.I, F=self.F, M=self, np=np)

    def run(self) -> None:
        """Until all threads have ended."""
        code, stop, leaders, segment = self.program.code, self.program.stop, self.program.leaders, self.program.segment
        while True:
            picked = self.pick()
            if picked is None:
                return
            lanes, pc = picked
            S = pack_lanes(lanes)
            while True:
                if self.flying:
                    self.check_flying(pc, S)
                function, after = segment(pc)
                if function is not None:
                    try:
                        function(S)
                    except PtxError:
                        raise
                    except Exception as error:
                        texts = [code[i][1].text for i in range(pc, after)]
                        raise PtxError(f"{error!r} in\n" + "\n".join(texts)) from error
                    self.executed += after - pc
                pc = after
                if stop[pc]:
                    lanes, pc = self.at_stop(lanes, S, pc)
                    if lanes is None:
                        break
                    S = pack_lanes(lanes)
                if (self.shuffle or pc in leaders) and lanes.size < np.count_nonzero(self.status != DONE):
                    self.pc[lanes] = pc
                    break

    def pick(self) -> tuple[np.ndarray, int] | None:
        """Threads at one place that can run, those furthest behind first; None when all are done."""
        while True:
            while self.accelerator and self.random.random() < 0.3:
                self.complete_copy()
            can = np.flatnonzero(self.status == RUNNING)
            if can.size:
                break
            if self.accelerator:
                self.complete_copy()
                continue
            left = np.flatnonzero(self.status != DONE)
            if left.size == 0:
                return None
            places = sorted({(int(self.pc[i]), int(self.block[i]), int(self.warp[i])) for i in left})
            texts = [f"block {b} warp {w}: {self.program.code[p][1].text}" for p, b, w in places[:12]]
            raise PtxError("no thread can go on\n" + "\n".join(texts))
        if self.shuffle:
            warp = self.random.choice(np.unique(self.warp[can]).tolist())
            can = can[self.warp[can] == warp]
        pc = int(self.pc[can].min())
        return can[self.pc[can] == pc], pc

    def at_stop(self, lanes: np.ndarray, S: Any, pc: int) -> tuple[np.ndarray | None, int | None]:
        """Runs the instruction at pc; returns the lanes that go on together, and where."""
        f, ins = self.program.code[pc]
        op = ins.op[0]
        name = ".".join(ins.op)
        self.program.opcodes[name] = self.program.opcodes.get(name, 0) + 1
        self.executed += 1
        if op == "bra":
            return self.part(lanes, pc, f, ins)
        if op in ("ret", "exit"):
            return self.leave(lanes, pc, f, ins)
        if op == "call":
            return self.enter(lanes, S, pc, f, ins)
        if op == "trap":
            raise PtxError("trap")
        if op in ("bar", "barrier") and not (op == "bar" and ins.op[1] == "warp"):
            return self.meet_at_bar(lanes, pc, f, ins)
        if op == "mbarrier":
            return self.wait_mbarrier(lanes, S, pc, f, ins)
        whole = self.converge(lanes, pc, 128 if op == "wgmma" else 32)
        if whole is None:
            return None, None
        if ins.guard is not None:
            raise PtxError(f"a guard on {ins.text}")
        getattr(self, "do_" + op)(f, ins, whole, pack_lanes(whole))
        return whole, pc + 1

    def guard(self, lanes: np.ndarray, f: Function, ins: Instruction) -> np.ndarray:
        """For which lanes a guarded instruction is run."""
        return self.U[self.program.registers[f.name, ins.guard]][lanes] ^ ins.negated

    def part(self, lanes: np.ndarray, pc: int, f: Function, ins: Instruction) -> tuple[np.ndarray | None, int | None]:
        """A branch."""
        target = self.program.label[f.name, ins.args[0][1]]
        if ins.guard is None:
            return lanes, target
        taken = self.guard(lanes, f, ins)
        count = np.count_nonzero(taken)
        if count in (0, lanes.size):
            return lanes, target if count else pc + 1
        self.pc[lanes] = np.where(taken, target, pc + 1)
        return None, None

    def leave(self, lanes: np.ndarray, pc: int, f: Function, ins: Instruction) -> tuple[None, None]:
        """The end of a function or of the kernel."""
        if ins.guard is not None:
            leaving = self.guard(lanes, f, ins)
            self.pc[lanes[~leaving]] = pc + 1
            lanes = lanes[leaving]
        if lanes.size and (f.entry or ins.op[0] == "exit"):
            self.check_waited(pack_lanes(lanes), "ends")
            self.status[lanes] = DONE
            self.pc[lanes] = pc
            self.after_exit()
        elif lanes.size:
            self.pc[lanes] = self.returns[f.name][lanes]
        return None, None

    def enter(self, lanes: np.ndarray, S: Any, pc: int, f: Function, ins: Instruction) -> tuple[np.ndarray, int]:
        """A call: its arguments are copied, and where to go on is kept."""
        callee = next(a[1] for a in ins.args if a[0] == "name" and a[1] in self.program.start)
        function = self.program.module.function(callee)
        lists = [a for a in ins.args if a[0] == "list"]
        given = lists[-1][1] if function.params else []
        for (name, _, _), arg in zip(function.params, given, strict=True):
            self.call_copy(f.name, arg[1], callee, name, S)
        self.returns.setdefault(callee, np.zeros(self.n, dtype=np.int64))[lanes] = pc + 1
        return lanes, self.program.start[callee]

    def converge(self, lanes: np.ndarray, pc: int, unit: int) -> np.ndarray | None:
        """Those lanes, and others that wait at pc, whose whole warp (or warpgroup) has come; the rest waits."""
        if lanes.size == np.count_nonzero(self.status != DONE):
            return lanes
        groups = lanes // unit
        alive = np.bincount(np.flatnonzero(self.status != DONE) // unit)
        here = np.bincount(groups, minlength=alive.size)
        complete = here == alive
        if complete[groups].all():
            return lanes
        self.pc[lanes] = pc
        self.status[lanes] = WAITING
        waiting = np.flatnonzero((self.status == WAITING) & (self.pc == pc))
        here = np.bincount(waiting // unit, minlength=alive.size)
        ready = waiting[(here == alive)[waiting // unit]]
        if ready.size == 0:
            return None
        self.status[ready] = RUNNING
        return ready

    def special(self, name: str) -> np.ndarray:
        """A special register."""
        return self.specials[name]

    def value(self, f: Function, arg: tuple, kind: str, S: Any) -> Any:
        """An operand of an instruction that the machine runs."""
        text = self.program.read(f, arg, kind, "S")
        return eval(text, self.program.namespace, {"S": S})
