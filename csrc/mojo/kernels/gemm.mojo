"""The matrix product shared by matmul and linear: C[M, N] = A[M, K] B[K, N].

gemm runs the tiles of tile.mojo on the operands of pack.mojo over a grid of threads and hands each finished one to an
epilogue. A few rows take the short way of gemm_direct.mojo. An element of C is the sum of blocks of BLOCK_STEPS steps,
each block a sum over k in order, whatever the layout of A and B and whatever tile the element falls into: neither M nor
the number of threads can change it.
"""

from std.memory import stack_allocation
from std.sys import size_of
from std.sys.intrinsics import PrefetchOptions, prefetch

from .contract import Elements
from .gemm_direct import DIRECT_ROWS, gemm_direct
from .pack import BLOCK_STEPS, OperandA, PackB, OperandB, panels_of
from .simd import Accumulator, ceil_div, lanes, load, store
from .threads import Task, parallel_for
from .tile import (
    TILE_ROWS,
    VECTOR_BYTES,
    PrefetchStride,
    Bytes,
    Epilogue,
    Tile,
    tile_columns,
    tile_for,
    word_lanes,
    word_size,
)

comptime BLOCK_ROWS = 104  # rows of A per pass over the panels, at least
comptime BLOCK_BYTES = 800 * 1024  # or as many as these hold
comptime COLUMN_BLOCK_ROWS = 192  # the same where A is M-major


@always_inline
def prefetch_rows[T: DType](start: Elements[T], stride: Int, rows: Int, columns: Int):
    """The lines of `columns` elements in each of `rows` rows."""
    comptime line = 64 // size_of[Scalar[T]]()
    for r in range(rows):
        for j in range(0, columns, line):
            prefetch[PrefetchOptions().for_write()](start.unsafe_offset(r * stride + j).unsafe_bitcast[UInt8]())


def row_threads[T: DType](threads: Int, M: Int, panels: Int) -> Int:
    """How many threads share the rows; the others share the panels.

    Panels alone where there are enough of them: each is then packed by the thread that needs it. Else rows first, as
    long as a thread keeps about 48, because each pass over the panels is paid by all rows of a block.
    """
    if panels >= 2 * threads:
        return 1
    var best = 1
    var best_cost = Int.MAX
    for rows in range(1, threads + 1):
        var share = ceil_div(M, rows)
        var cost = ceil_div(share, TILE_ROWS) * ceil_div(panels, threads // rows) * 64 + (rows if share < 48 else 0)
        if cost <= best_cost:
            best = rows
            best_cost = cost
    return best


@fieldwise_init
struct Product[T: DType, P: DType, E: Epilogue](Task):
    """Units are the parts of a grid of row_parts x column_parts."""

    var a: OperandA
    var b: OperandB[Self.T, Self.P]
    var M: Int
    var row_parts: Int
    var column_parts: Int
    var epilogue: Self.E

    def run(self, begin: Int, end: Int, thread: Int):
        var panels = panels_of[Self.T](self.b.N)
        for unit in range(begin, end):
            var i = unit // self.column_parts
            var j = unit % self.column_parts
            var r0 = self.M * i // self.row_parts
            var r1 = self.M * (i + 1) // self.row_parts
            var p0 = panels * j // self.column_parts
            var p1 = panels * (j + 1) // self.column_parts
            if self.a.columns:
                self.range[True](r0, r1, p0, p1)
            else:
                self.range[False](r0, r1, p0, p1)

    @no_inline
    def range[columns: Bool](self, row_begin: Int, row_end: Int, panel_begin: Int, panel_end: Int):
        comptime A = Accumulator[Self.T]
        comptime word = word_size[Self.T]
        var sums = stack_allocation[TILE_ROWS * tile_columns[Self.T], A, alignment=64]()
        var a = self.a
        var b = self.b
        var steps = b.steps()
        var block_rows = COLUMN_BLOCK_ROWS if columns else max(BLOCK_ROWS, BLOCK_BYTES // max(steps * word, 1))
        var row_blocks = ceil_div(row_end - row_begin, block_rows)
        var blocks = max(ceil_div(steps, BLOCK_STEPS), 1)
        # One pass needs each panel once: all are packed where the first is, which stays in L2.
        var once = b.packs and row_blocks == 1
        for row_block in range(row_blocks):
            var r0 = row_begin + (row_end - row_begin) * row_block // row_blocks
            var r1 = row_begin + (row_end - row_begin) * (row_block + 1) // row_blocks
            var tiles = ceil_div(r1 - r0, TILE_ROWS)  # of nearly equal height: 7 and 8 rows, never 8, 8, 1
            var packs = b.packs and row_block == 0
            # A K-major: a tile runs through all blocks of steps. Else all tiles do one block, then the next,
            # so that the strided part of A stays in L2.
            for outer in range(blocks if columns else 1):
                var first_block = outer
                var end_block = outer + 1 if columns else blocks
                for panel in range(panel_begin, panel_end):
                    var vectors = b.vectors(panel)
                    var line = vectors * VECTOR_BYTES
                    var panel_b = b.at(panel_begin if once else panel)
                    if packs:
                        b.pack(panel, first_block * BLOCK_STEPS, min(end_block * BLOCK_STEPS, steps), panel_b)
                    for t in range(tiles):
                        var i0 = r0 + (r1 - r0) * t // tiles
                        var i1 = r0 + (r1 - r0) * (t + 1) // tiles
                        var run = tile_for[Self.T, columns](i1 - i0, vectors)
                        var column = panel * tile_columns[Self.T]
                        self.epilogue.prefetch(i0, i1 - i0, column, b.columns(panel))
                        var lines = PrefetchStride(panel_b, 64)
                        if panel + 1 < panel_end and t * 64 < line:
                            lines = b.prefetch_lines(panel + 1, t, packs)
                        for block in range(first_block, end_block):
                            var s0 = block * BLOCK_STEPS
                            var at = s0 * a.stride + i0 * word if columns else i0 * a.stride + s0 * word
                            run(
                                a.data.unsafe_offset(at),
                                a.stride,
                                panel_b.unsafe_offset(s0 * line),
                                min(BLOCK_STEPS, steps - s0),
                                PrefetchStride(lines.first.unsafe_offset(s0 * lines.stride), lines.stride),
                                block > first_block,
                                sums,
                                vectors * word_lanes[Self.T],
                            )
                        self.epilogue.store(
                            Tile[A](
                                sums,
                                vectors * word_lanes[Self.T],
                                i0,
                                i1 - i0,
                                column,
                                b.columns(panel),
                                first_block == 0,
                                end_block == blocks,
                            )
                        )


def gemm[T: DType, P: DType, E: Epilogue](threads: Int, a: OperandA, b: OperandB[T, P], M: Int, epilogue: E):
    """C[M, N] = A B for a prepared A; hands each tile to the epilogue on the thread that computed it."""
    if M == 0 or b.N == 0:
        return
    if M <= DIRECT_ROWS and b.matrix.row == 1 and not a.columns:
        gemm_direct(threads, a, b, M, epilogue)
        return
    var panels = panels_of[T](b.N)
    var row_parts = min(row_threads[T](threads, M, panels), M)
    var column_parts = min(max(threads // row_parts, 1), panels)
    var operand_b = b
    if b.packs and row_parts > 1:  # several threads read each panel: it must be there before
        var pack = PackB[T, P](b.matrix, b.K, b.N, b.packed)
        parallel_for(threads, pack.units(), pack)
        operand_b.packs = False
    parallel_for(
        threads, row_parts * column_parts, Product[T, P, E](a, operand_b, M, row_parts, column_parts, epilogue)
    )


@fieldwise_init
struct Store[T: DType, O: DType](Epilogue):
    """The plain epilogue: stores C as type O, `stride` elements from row to row.

    Sums of blocked steps wait in `partial`, which has the layout of C and is C itself where O is the accumulator type.
    """

    var c: Elements[Self.O]
    var partial: Elements[Accumulator[Self.T]]
    var stride: Int

    @always_inline
    def prefetch(self, row: Int, rows: Int, column: Int, columns: Int):
        prefetch_rows(self.c.unsafe_offset(row * self.stride + column), self.stride, rows, columns)

    def store[A: DType](self, tile: Tile[A]):
        var partial = self.partial.unsafe_bitcast[Scalar[A]]()
        for r in range(tile.rows):
            var at = (tile.row + r) * self.stride + tile.column
            for j in range(0, tile.columns, lanes[A]):
                var n = tile.columns - j
                var v = load[A](tile.data.unsafe_offset(r * tile.stride + j))
                if not tile.first:
                    v = load[A](partial.unsafe_offset(at + j), n) + v
                if tile.last:
                    store(self.c.unsafe_offset(at + j), v, n)
                else:
                    store(partial.unsafe_offset(at + j), v, n)


@always_inline
def partial_bytes[T: DType, O: DType](M: Int, N: Int) -> Int:
    """Bytes of `partial` for an M x N result of type O."""
    comptime A = Accumulator[T]
    return 0 if A == O else M * N * size_of[Scalar[A]]()


@always_inline
def store_to[T: DType, O: DType](c: Elements[O], partial: Bytes, stride: Int) -> Store[T, O]:
    comptime A = Accumulator[T]
    comptime if A == O:
        return Store[T, O](c, c.unsafe_bitcast[Scalar[A]](), stride)
    else:
        return Store[T, O](c, partial.unsafe_bitcast[Scalar[A]](), stride)
