"""Products of few rows whose B is K-major, as a weight is: C[M, N] = A[M, K] B[K, N] without packing.

A packed panel pays when many rows read it. For a class token or a classification head it would be written and read back
once: here each block of B is transposed in registers, as for packing, and multiplied at once. Every element of C is the
same chain of fused multiply-adds as in `tile`, block of BLOCK_STEPS after block: the same bits.
"""

from std.memory import stack_allocation
from std.sys.intrinsics import PrefetchOptions, prefetch

from .contract import Elements
from .pack import BLOCK_STEPS, OperandA, Matrix, OperandB, row_words, transpose
from .simd import Accumulator, Vector, ceil_div, lanes
from .threads import Task, parallel_for
from .tile import TILE_ROWS, Bytes, Epilogue, Tile, Word, Words, depth, dot, steps_of, word_lanes, word_size

comptime DIRECT_ROWS = TILE_ROWS  # as many as have an accumulator beside the words of a block
comptime BLOCKS_AHEAD = 6  # blocks of B prefetched in advance, on every one of its rows


@always_inline
def multiply_step[T: DType, R: Int](a: Bytes, stride: Int, words: Words[T], mut c: Array[Vector[Accumulator[T]], R]):
    """One step of every row: the word of row r is at a + r stride."""
    comptime for r in range(R):
        var word = a.unsafe_offset(r * stride).unsafe_bitcast[Scalar[Word[T]]]().unsafe_load[alignment=2]()
        c[r] = dot[T](Words[T](word), words, c[r])


@no_inline
def direct_tile[
    T: DType, P: DType, R: Int
](a: Bytes, stride: Int, b: Matrix[P], j: Int, K: Int, N: Int, sums: Elements[Accumulator[T]]):
    """sums[R][lanes] = A B for the columns of B from j, as many as a vector has lanes.

    Row r, step s of A is the word at a + r stride + s word_size. Columns beyond N are made from column N - 1.
    """
    comptime V = Vector[Accumulator[T]]
    comptime n = word_lanes[T]
    var steps = steps_of[T](K)
    var start = b.at(0, j)
    var last = N - 1 - j  # column of the block
    var total = Array[V, R](fill=V(0))
    for begin in range(0, steps, BLOCK_STEPS):
        var end = min(begin + BLOCK_STEPS, steps)
        var c = Array[V, R](fill=V(0))
        for s in range(begin, end, n):
            # The block prefetched is the one of these columns or, near their end, of the next ones.
            var ahead = s + BLOCKS_AHEAD * n
            var at = ahead * depth[T] if ahead < steps else n * b.col + (ahead - steps) * depth[T]
            var block = Array[Words[T], n](fill=0)
            comptime for i in range(n):
                block[i] = row_words[T](start.unsafe_offset(min(i, last) * b.col), s * depth[T], K)
                prefetch[PrefetchOptions()](start.unsafe_offset(at + i * b.col).unsafe_bitcast[UInt8]())
            transpose(block)
            var words_a = a.unsafe_offset(s * word_size[T])
            if end - s >= n:
                comptime for i in range(n):
                    multiply_step[T, R](words_a.unsafe_offset(i * word_size[T]), stride, block[i], c)
            else:
                comptime for i in range(n):
                    if i < end - s:
                        multiply_step[T, R](words_a.unsafe_offset(i * word_size[T]), stride, block[i], c)
        comptime for r in range(R):
            total[r] = total[r] + c[r] if begin > 0 else c[r]
    comptime for r in range(R):
        sums.unsafe_offset(r * lanes[Accumulator[T]]).unsafe_store(total[r])


comptime DirectTile[T: DType, P: DType] = def(
    Bytes, Int, Matrix[P], Int, Int, Int, Elements[Accumulator[T]]
) thin -> None


@always_inline
def direct_tile_for[T: DType, P: DType](rows: Int) -> DirectTile[T, P]:
    """The tile of `rows` <= DIRECT_ROWS rows."""
    comptime for r in range(DIRECT_ROWS, 1, -1):
        if rows == r:
            return direct_tile[T, P, r]
    return direct_tile[T, P, 1]


@fieldwise_init
struct DirectProduct[T: DType, P: DType, E: Epilogue](Task):
    """Units are vectors of columns."""

    var a: OperandA
    var b: OperandB[Self.T, Self.P]
    var M: Int
    var epilogue: Self.E

    def run(self, begin: Int, end: Int, thread: Int):
        comptime A = Accumulator[Self.T]
        comptime n = word_lanes[Self.T]
        var sums = stack_allocation[DIRECT_ROWS * n, A, alignment=64]()
        var multiply = direct_tile_for[Self.T, Self.P](self.M)
        for unit in range(begin, end):
            var j = unit * n
            multiply(self.a.data, self.a.stride, self.b.matrix, j, self.b.K, self.b.N, sums)
            self.epilogue.store(Tile[A](sums, n, 0, self.M, j, min(n, self.b.N - j), True, True))


def gemm_direct[T: DType, P: DType, E: Epilogue](threads: Int, a: OperandA, b: OperandB[T, P], M: Int, epilogue: E):
    """C = A B for M <= DIRECT_ROWS rows; hands each tile to the epilogue on the thread that computed it."""
    parallel_for(threads, ceil_div(b.N, word_lanes[T]), DirectProduct[T, P, E](a, b, M, epilogue))
