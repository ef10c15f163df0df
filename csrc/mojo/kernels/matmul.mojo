"""matmul: c = a b, da = dc b^T, db = a^T dc for each of `batch` pairs.

Nothing is saved beyond the operands. Threads take whole pairs where there are enough of them, else they share each pair
(gemm.mojo).
"""

from .contract import Context, Elements, MatmulBwd, MatmulFwd, Parameters, elements
from .gemm import gemm, partial_bytes, store_to
from .pack import COUNT_ONLY, Arena, Matrix, OperandB, packed_b_bytes, prepare_a, prepared_a_bytes
from .threads import Task, parallel_for
from .tile import Bytes


@fieldwise_init
struct Buffers[T: DType](TrivialRegisterPassable):
    """What one product [M, K] x [K, N] needs beside its operands and its result."""

    var packed_b: Bytes
    var copy_a: Bytes
    var partial: Bytes
    var bytes: Int

    def __init__(out self, a: Matrix[Self.T], M: Int, N: Int, K: Int, base: Int):
        var arena = Arena(base, 0)
        self.packed_b = arena.take(packed_b_bytes[Self.T](K, N))
        self.copy_a = arena.take(prepared_a_bytes(a, M, K))
        self.partial = arena.take(0 if a.col == 1 else partial_bytes[Self.T, Self.T](M, N))
        self.bytes = arena.used


def multiply[
    T: DType
](threads: Int, a: Matrix[T], b: Matrix[T], M: Int, N: Int, K: Int, c: Elements[T], workspace: Int):
    if M == 0 or N == 0:
        return
    var buffers = Buffers[T](a, M, N, K, workspace)
    var operand_a = prepare_a(threads, a, M, K, buffers.copy_a)
    gemm(
        threads,
        operand_a,
        OperandB[T, T](b, buffers.packed_b, K, N, True),
        M,
        store_to[T](c, buffers.partial, N),
    )


@always_inline
def splits(batch: Int, context: Context) -> Bool:
    return context.threads() > 1 and batch >= context.threads()


@fieldwise_init
struct Forward[T: DType](Task):
    """Units are pairs of the batch."""

    var p: Parameters[MatmulFwd]
    var threads: Int  # for each pair
    var bytes: Int  # of workspace, for each thread

    def run(self, begin: Int, end: Int, thread: Int):
        ref p = self.p[]
        var workspace = Int(elements[DType.uint8](p.workspace)) + thread * self.bytes
        for i in range(begin, end):
            var a = Matrix(elements[Self.T](p.a.data).unsafe_offset(i * p.a.batch), p.a.row, p.a.col)
            var b = Matrix(elements[Self.T](p.b.data).unsafe_offset(i * p.b.batch), p.b.row, p.b.col)
            var c = elements[Self.T](p.c).unsafe_offset(i * p.M * p.N)
            multiply(self.threads, a, b, p.M, p.N, p.K, c, workspace)


@always_inline
def forward_bytes[T: DType](p: MatmulFwd) -> Int:
    return Buffers[T](Matrix(elements[T](p.a.data), p.a.row, p.a.col), p.M, p.N, p.K, COUNT_ONLY).bytes


def forward[T: DType](p: Parameters[MatmulFwd]):
    var threads = p[].context.threads()
    var split = splits(p[].batch, p[].context)
    var task = Forward[T](p, 1 if split else threads, forward_bytes[T](p[]))
    parallel_for(threads if split else 1, p[].batch, task)


def forward_workspace[T: DType](p: MatmulFwd) -> Int:
    return forward_bytes[T](p) * (p.context.threads() if splits(p.batch, p.context) else 1)


@fieldwise_init
struct Backward[T: DType](Task):
    """Units are pairs of the batch."""

    var p: Parameters[MatmulBwd]
    var threads: Int
    var bytes: Int

    def run(self, begin: Int, end: Int, thread: Int):
        ref p = self.p[]
        var workspace = Int(elements[DType.uint8](p.workspace)) + thread * self.bytes
        for i in range(begin, end):
            var dc = Matrix(elements[Self.T](p.dc).unsafe_offset(i * p.M * p.N), p.N, 1)
            if p.da:
                var b = Matrix(elements[Self.T](p.b.data).unsafe_offset(i * p.b.batch), p.b.col, p.b.row)
                var da = elements[Self.T](p.da).unsafe_offset(i * p.M * p.K)
                multiply(self.threads, dc, b, p.M, p.K, p.N, da, workspace)
            if p.db:
                var a = Matrix(elements[Self.T](p.a.data).unsafe_offset(i * p.a.batch), p.a.col, p.a.row)
                var db = elements[Self.T](p.db).unsafe_offset(i * p.K * p.N)
                multiply(self.threads, a, dc, p.K, p.N, p.M, db, workspace)


@always_inline
def backward_bytes[T: DType](p: MatmulBwd) -> Int:
    var of_da = Buffers[T](Matrix(elements[T](p.dc), p.N, 1), p.M, p.K, p.N, COUNT_ONLY).bytes
    return max(of_da, Buffers[T](Matrix(elements[T](p.a.data), p.a.col, p.a.row), p.K, p.N, p.M, COUNT_ONLY).bytes)


def backward[T: DType](p: Parameters[MatmulBwd]):
    var threads = p[].context.threads()
    var split = splits(p[].batch, p[].context)
    var task = Backward[T](p, 1 if split else threads, backward_bytes[T](p[]))
    parallel_for(threads if split else 1, p[].batch, task)


def backward_workspace[T: DType](p: MatmulBwd) -> Int:
    return backward_bytes[T](p) * (p.context.threads() if splits(p.batch, p.context) else 1)
