"""What the threads of a warp do together: shuffles, ldmatrix, mma. Part of Machine."""

from __future__ import annotations

import numpy as np

from .parse import PtxError
from .values import from_bfloat16, from_e4m3

#: The types of a product of bytes: of its result, of its operands and of what is added.
SIGNED = ("s32", "s8", "s8", "s32")
E4M3 = ("f32", "e4m3", "e4m3", "f32")


class Matrices:
    """Every thread of the warps in `lanes` has come; `ins` is done for all at once."""

    def do_shfl(self, f, ins, lanes, S):
        if ins.op[1:3] not in (("sync", "bfly"), ("sync", "idx")):
            raise PtxError(ins.text)
        to = ins.args[0]
        to = to[1][0] if to[0] == "pair" else to
        value = self.U[self.program.registers[f.name, ins.args[1][1]]][S]
        which = self.value(f, ins.args[2], "u32", S)
        clamp, members = self.value(f, ins.args[3], "u32", S), self.value(f, ins.args[4], "u32", S)
        if np.any(np.asarray(clamp) != 31) or np.any(np.asarray(members) != 0xFFFFFFFF):
            raise PtxError(ins.text)
        which = np.broadcast_to(np.asarray(which, dtype=np.int64), lanes.shape)
        mine = np.arange(lanes.size)
        other = mine ^ which if ins.op[2] == "bfly" else mine // 32 * 32 + which % 32
        self.U[self.program.registers[f.name, to[1]]][S] = value[other]

    def do_ldmatrix(self, f, ins, lanes, S):
        if ins.op[1:5] != ("sync", "aligned", "m8n8", "x4"):
            raise PtxError(ins.text)
        address = eval(self.program.address(f, ins.args[1], "u64", "S"), self.program.namespace, {"S": S})
        _, place = self.resolve("shared", address, 16, S)
        words = (place // np.uint64(4)).astype(np.int64)
        for i in range(4):
            self.note_read(lanes, words + i)
        rows = np.stack([self.shared_views[4][words + i] for i in range(4)], axis=1).reshape(-1, 4, 8, 4)
        if "trans" in ins.op:
            halves = np.ascontiguousarray(rows).view(np.uint16)  # [warp, matrix, row, 8]
            turned = np.ascontiguousarray(halves.transpose(0, 1, 3, 2)).view(np.uint32)
            rows = turned
        # the row lane / 4, the word lane % 4
        for i, register in enumerate(ins.args[0][1]):
            self.U[self.program.registers[f.name, register[1]]][S] = rows[:, i].reshape(-1)

    def do_mma(self, f, ins, lanes, S):
        shape, kind = ins.op[3], ins.op[7]
        if shape == "m16n8k32":
            return self.do_mma_of_bytes(f, ins, lanes, S)
        if ins.op[1:3] != ("sync", "aligned") or ins.op[4:7] != ("row", "col", "f32") or ins.op[9] != "f32":
            raise PtxError(ins.text)
        registers = [[self.program.registers[f.name, x[1]] for x in group[1]] for group in ins.args]
        d, a, b, c = registers
        warps = lanes.size // 32
        A = np.stack([self.U[r][S].reshape(warps, 32) for r in a], axis=1)
        B = np.stack([self.U[r][S].reshape(warps, 32) for r in b], axis=1)
        C = np.stack([self.F[r][S].reshape(warps, 32) for r in c], axis=1)
        if shape == "m16n8k16":
            A, B = halves_of(A, kind), halves_of(B, kind)
            A, B = A[:, A16[0], A16[1], A16[2]], B[:, B16[0], B16[1], B16[2]]
        elif shape == "m16n8k8" and kind == "tf32":
            for X in (A, B):
                if ((X & 0x1FFF != 0) & (X & 0x7FFFFFFF <= 0x7F800000)).any():
                    raise PtxError("an operand is not rounded to TF32")
            A, B = A.view(np.float32), B.view(np.float32)
            A, B = A[:, A8[0], A8[1]], B[:, B8[0], B8[1]]
        else:
            raise PtxError(ins.text)
        product = np.matmul(A.astype(np.float64), B.astype(np.float64))
        D = (C.astype(np.float64) + product[:, C_ROW, C_COLUMN]).astype(np.float32)
        for i, register in enumerate(d):
            self.F[register][S] = D[:, i].reshape(-1)

    def do_mma_of_bytes(self, f, ins, lanes, S):
        """Bytes, four to a word: the words lie as those of m16n8k8, the sums of signed ones are 32-bit integers."""
        kinds = ins.op[6:]
        if ins.op[1:6] != ("sync", "aligned", "m16n8k32", "row", "col") or kinds not in (SIGNED, E4M3):
            raise PtxError(ins.text)
        d, a, b, c = [[self.program.registers[f.name, x[1]] for x in group[1]] for group in ins.args]
        warps = lanes.size // 32
        A = np.stack([self.U[r][S].reshape(warps, 32) for r in a], axis=1)[:, A8[0], A8[1]]
        B = np.stack([self.U[r][S].reshape(warps, 32) for r in b], axis=1)[:, B8[0], B8[1]]
        C = np.stack([self.U[r][S].reshape(warps, 32) for r in c], axis=1).view(np.int32)
        A = np.ascontiguousarray(A).view(np.uint8).reshape(warps, 16, 32)
        B = np.ascontiguousarray(B.transpose(0, 2, 1)).view(np.uint8).reshape(warps, 8, 32)
        if kinds == E4M3:
            products = from_e4m3(A)[:, :, None, :] * from_e4m3(B)[:, None, :, :]
            terms = np.append(products[:, C_ROW, C_COLUMN], C.view(np.float32)[..., None], axis=-1)
            D = sum_of_14_bits(terms).astype(np.float32).view(np.int32)
        else:
            A, B = (X.view(np.int8).astype(np.int32) for X in (A, B))
            D = C + np.matmul(A, B.transpose(0, 2, 1))[:, C_ROW, C_COLUMN]
        for i, register in enumerate(d):
            self.U[register][S] = D[:, i].reshape(-1).view(np.uint32)

    def do_bar(self, f, ins, lanes, S):
        pass  # bar.warp.sync: the warp has met


def sum_of_14_bits(terms: np.ndarray) -> np.ndarray:
    """[..., n] added up as 8.9 adds products of e4m3: each cut off below 2^-13 of the largest (arXiv:2411.10958)."""
    largest = np.abs(terms).max(-1, keepdims=True)
    _, exponent = np.frexp(np.nan_to_num(largest))
    unit = np.ldexp(1.0, exponent - 14)  # frexp's fraction begins with 1/2
    return (np.trunc(terms / unit) * unit).sum(-1)


def halves_of(words: np.ndarray, kind: str, split: bool = True) -> np.ndarray:
    """[..., 2] floats of 32-bit words, or the floats of 16-bit ones."""
    bits = np.ascontiguousarray(words)
    if split:
        bits = bits.view(np.uint16).reshape(*words.shape, 2)
    return from_bfloat16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def _indices() -> tuple:
    """PTX ISA, "Matrix Fragments for mma.m16n8k16" and "... m16n8k8": the register, lane and half of an element."""
    row, column = np.arange(16)[:, None], np.arange(16)[None, :]
    a16 = (row // 8 + 2 * (column // 8), row % 8 * 4 + column % 8 // 2, column % 2 + 0 * row)
    k, n = np.arange(16)[:, None], np.arange(8)[None, :]
    b16 = (k // 8 + 0 * n, n * 4 + k % 8 // 2, k % 2 + 0 * n)
    row, column = np.arange(16)[:, None], np.arange(8)[None, :]
    a8 = (row // 8 + 2 * (column // 4), row % 8 * 4 + column % 4)
    k, n = np.arange(8)[:, None], np.arange(8)[None, :]
    b8 = (k // 4 + 0 * n, n * 4 + k % 4)
    i, lane = np.arange(4)[:, None], np.arange(32)[None, :]
    return a16, b16, a8, b8, lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2


A16, B16, A8, B8, C_ROW, C_COLUMN = _indices()
