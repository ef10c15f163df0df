"""attention_rows: P = softmax(scale q k^T) of chosen queries, which attention_fwd multiplies with v, in memory.

    m_i = max_j q_i k_j,  P_ij = exp(scale (q_i k_j - m_i)) / sum_j exp(scale (q_i k_j - m_i))

Threads take blocks of queries of a head. Keys come in blocks, packed into the panels that `tile` reads; each row tile of
queries leaves its scores where its probabilities will be, and a row becomes them when it is whole. Per row 2 L D FLOPs
and L exponentials in the precision of the accumulator, whose type the rows have.
"""

from .attention_fwd import fold, larger, least
from .attention_tiles import Blocks, Panels, PrefetchQueue, RowTile, multiply, pack, packed_bytes, store_row
from .contract import AttentionRows, Elements, Heads, Parameters, elements
from .functions import LOG2_E, exp2
from .pack import COUNT_ONLY, Arena, Matrix, prepare_a
from .simd import Accumulator, Vector, copy, keep, lanes, load, store
from .threads import Task, parallel_for
from .tile import TILE_ROWS, Bytes, steps_of, word_size

# Which queries stand beside each other changes no row: its sums follow from L, D and the dtype.
comptime KEYS = 640  # per block: packed they take 160 KB of L2 (D 64, float32)
comptime QUERIES = 64  # per unit of work, for which the keys are packed: 2 to 3 % of its work


struct Scratch[T: DType](ImplicitlyCopyable):
    """Scratch memory of one thread."""

    comptime A = Accumulator[Self.T]
    var keys: Bytes  # packed
    var queries: Elements[Self.T]  # a row tile
    var words: Bytes  # the same, where its words cannot be read in place
    var scores: Elements[Self.A]  # [TILE_ROWS, width of a block of keys]
    var bytes: Int

    def __init__(out self, L: Int, D: Int, base: Int):
        var arena = Arena(base, 0)
        var count = min(L, KEYS)
        self.keys = arena.take(packed_bytes[Self.T](D, count))
        self.queries = arena.take_elements[Self.T](TILE_ROWS * D)
        self.words = arena.take(TILE_ROWS * steps_of[Self.T](D) * word_size[Self.T])
        self.scores = arena.take_elements[Self.A](TILE_ROWS * Panels[Self.T](count).width())
        self.bytes = arena.used


@always_inline
def powers[A: DType](x: Vector[A]) -> Vector[A]:
    """2^x to the precision of the accumulator."""
    return rebind[Vector[A]](exp2[A](rebind[Vector[Accumulator[A]]](x)))


def softmax[A: DType, negative: Bool](row: Elements[A], keys: Int, scale: Scalar[A]):
    """A row of scores to their softmax, in place. scale includes log2(e). A row of -infinity only becomes NaN, like the
    reference's."""
    comptime n = lanes[A]
    comptime none = least[negative, A]()
    var largest = Vector[A](none)
    for j in range(0, keys, n):
        largest = larger[negative](keep(load[A](row.unsafe_offset(j), keys - j), keys - j, none), largest)
    var origin = fold[negative](largest)
    var sums = Vector[A](0)
    for j in range(0, keys, n):
        var e = powers[A](scale * (load[A](row.unsafe_offset(j), keys - j) - origin))
        store(row.unsafe_offset(j), e, keys - j)
        sums += keep(e, keys - j, 0)
    var total = Vector[A](sums.reduce_add())
    for j in range(0, keys, n):
        store(row.unsafe_offset(j), load[A](row.unsafe_offset(j), keys - j) / total, keys - j)


@fieldwise_init
struct Worker[T: DType, negative: Bool](ImplicitlyCopyable):
    """One thread at work on units, the blocks of queries of each head."""

    comptime A = Accumulator[Self.T]
    var p: Parameters[AttentionRows]
    var scratch: Scratch[Self.T]
    var packed: Int  # which block of which head's keys scratch holds

    @always_inline
    def of_head[E: DType](self, x: Heads, head: Int, n: Int) -> Elements[E]:
        var H = self.p[].H
        return x.at[E](head // H, n, head % H)

    def query(self, head: Int, row: Int) -> Elements[Self.T]:
        ref p = self.p[]
        var n = row
        if p.queries:
            n = Int(elements[DType.int64](p.queries)[unsafe_offset=row])
        return self.of_head[Self.T](p.q, head, n)

    def pack_keys(mut self, head: Int, j: Int, keys: Int):
        ref p = self.p[]
        if self.packed == head * p.L + j:
            return
        self.packed = head * p.L + j
        pack(Matrix(self.of_head[Self.T](p.k, head, j), 1, p.k.token), p.D, keys, self.scratch.keys)

    def row_tile(self, head: Int, i: Int, rows: Int, j: Int, keys: Int):
        """Scores of rows [i, i + rows) with the packed keys."""
        ref p = self.p[]
        for r in range(rows):
            copy(self.query(head, i + r), self.scratch.queries.unsafe_offset(r * p.D), p.D)
        var panels = Panels[Self.T](keys)
        var scores = RowTile(self.scratch.scores, panels.width(), rows)
        var operand_a = prepare_a(1, Matrix(self.scratch.queries, p.D, 1), rows, p.D, self.scratch.words)
        var queue = PrefetchQueue()
        multiply[Self.T](
            operand_a.data, operand_a.stride, self.scratch.keys, steps_of[Self.T](p.D), panels, False, scores, queue
        )
        for r in range(rows):
            var to = self.of_head[Self.A](p.rows, head, i + r).unsafe_offset(j)
            store_row(scores.row(r), Scalar[Self.A](1), keys, to)

    def run(mut self, head: Int, first: Int, count: Int):
        """The rows [first, first + count) of a head."""
        ref p = self.p[]
        var tiles = Blocks.of(count, TILE_ROWS)
        for j in range(0, p.L, KEYS):
            var keys = min(KEYS, p.L - j)
            self.pack_keys(head, j, keys)
            for t in range(tiles.count):
                self.row_tile(head, first + tiles.begin(t), tiles.end(t) - tiles.begin(t), j, keys)
        var scale = (p.scale * LOG2_E).cast[Self.A]()
        for i in range(first, first + count):
            softmax[Self.A, Self.negative](self.of_head[Self.A](p.rows, head, i), p.L, scale)


@fieldwise_init
struct Rows[T: DType, negative: Bool](Task):
    """Units are blocks of queries of a head."""

    var p: Parameters[AttentionRows]
    var blocks: Blocks
    var bytes: Int  # of scratch memory, for each thread

    def run(self, begin: Int, end: Int, thread: Int):
        ref p = self.p[]
        var base = Int(elements[DType.uint8](p.workspace)) + thread * self.bytes
        var worker = Worker[Self.T, Self.negative](self.p, Scratch[Self.T](p.L, p.D, base), -1)
        for unit in range(begin, end):
            var block = unit % self.blocks.count
            var first = self.blocks.begin(block)
            worker.run(unit // self.blocks.count, first, self.blocks.end(block) - first)


def rows[T: DType](p: Parameters[AttentionRows]):
    if p[].L == 0:
        return
    var blocks = Blocks.of(p[].R, QUERIES)
    var units = p[].B * p[].H * blocks.count
    var bytes = Scratch[T](p[].L, p[].D, COUNT_ONLY).bytes
    var threads = p[].context.threads()
    if p[].scale < 0:
        parallel_for(threads, units, Rows[T, True](p, blocks, bytes))
    else:
        parallel_for(threads, units, Rows[T, False](p, blocks, bytes))


def workspace[T: DType](p: AttentionRows) -> Int:
    return Scratch[T](p.L, p.D, COUNT_ONLY).bytes * p.context.threads()
