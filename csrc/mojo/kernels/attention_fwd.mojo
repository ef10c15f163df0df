"""attention forward: out = P v, P = softmax(scale q k^T) for each batch and head.

    m_i = max_j q_i k_j,  l_i = sum_j exp(scale (q_i k_j - m_i)),  P_ij = exp(scale (q_i k_j - m_i)) / l_i

Saved for the backward: out, m and 1 / l. Threads take blocks of queries of a head. Keys come in blocks, those of a head
packed once where all of them fit L2; each row tile of queries makes its scores, their exponentials and the product with
v while they are in L1. With more than one block of keys the softmax is online: sums and outputs so far are rescaled when
a larger score appears. The rows of q, k and v that come next are prefetched meanwhile.
"""

from std.sys import size_of

from .attention_tiles import Blocks, Panels, RowTile, PrefetchQueue, multiply, pack, packed_bytes, store_row
from .contract import AttentionFwd, Elements, Heads, Parameters, elements
from .functions import LOG2_E, exp2
from .pack import COUNT_ONLY, Arena, Matrix, prepare_a
from .simd import Accumulator, Vector, ceil_div, keep, lanes, load, store
from .threads import Task, parallel_for
from .tile import TILE_ROWS, Bytes, Operand, steps_of, word_size

# Sizes follow from N, L, D and the dtype, never from the batch or the threads: they decide the order of sums.
comptime KEYS = 640  # per block: K and V packed take 320 KB of L2 (D 64, float32)
comptime KEY_UNIT = 16  # blocks begin at multiples of it: only the last one has columns of padding
comptime RESIDENT_BYTES = 768 * 1024  # of L2, for all packed keys and values of a head
comptime QUERIES = 64  # per unit of work: B 1, H 3 still gives 12 units
comptime LONG_QUERIES = 256  # where each unit packs all keys again: 2 to 5 % of the work


struct Sizes[T: DType](ImplicitlyCopyable):
    var L: Int
    var key_units: Blocks  # KEY_UNIT keys each
    var key_panels: Panels[Self.T]
    var head_panels: Panels[Self.T]
    var keys_bytes: Int
    var values_bytes: Int  # of a packed block
    var resident: Bool  # all blocks of a head stay packed
    var queries: Blocks
    var steps: Int  # of a product over the head

    def __init__(out self, p: AttentionFwd):
        self.L = p.L
        self.key_units = Blocks.of(ceil_div(p.L, KEY_UNIT), KEYS // KEY_UNIT)
        self.key_panels = Panels[Self.T](min(self.key_units.largest() * KEY_UNIT, p.L))
        self.head_panels = Panels[Self.T](p.D)
        self.keys_bytes = packed_bytes[Self.T](p.D, self.key_panels.width())
        self.values_bytes = packed_bytes[Self.T](self.key_panels.width(), p.D)
        var bytes = self.key_units.count * (self.keys_bytes + self.values_bytes)
        self.resident = self.key_units.count == 1 or bytes <= RESIDENT_BYTES
        self.queries = Blocks.of(p.N, QUERIES if self.resident else LONG_QUERIES)
        self.steps = steps_of[Self.T](p.D)

    @always_inline
    def key_begin(self, block: Int) -> Int:
        return self.key_units.begin(block) * KEY_UNIT

    @always_inline
    def key_end(self, block: Int) -> Int:
        return min(self.key_units.end(block) * KEY_UNIT, self.L)


struct Scratch[T: DType](ImplicitlyCopyable):
    """Scratch memory of one thread."""

    comptime A = Accumulator[Self.T]
    var keys: Bytes  # packed
    var values: Bytes
    var queries: Bytes  # a row tile, where its words cannot be read in place
    var scores: Elements[Self.A]  # [TILE_ROWS, key_panels.width()]
    var probabilities: Elements[Operand[Self.T]]  # the same, in place of the scores where the type is theirs
    var outputs: Elements[Self.A]  # [queries, head_panels.width()], not yet divided by their totals
    var largest: Elements[Self.A]  # of each query of the block
    var totals: Elements[Self.A]
    var bytes: Int

    def __init__(out self, s: Sizes[Self.T], base: Int):
        var arena = Arena(base, 0)
        var blocks = s.key_units.count if s.resident else 1
        var width = s.key_panels.width()
        self.keys = arena.take(blocks * s.keys_bytes)
        self.values = arena.take(blocks * s.values_bytes)
        self.queries = arena.take(TILE_ROWS * s.steps * word_size[Self.T])
        self.scores = arena.take_elements[Self.A](TILE_ROWS * width)
        self.probabilities = self.scores.unsafe_bitcast[Scalar[Operand[Self.T]]]()
        comptime if Operand[Self.T] != Self.A:
            self.probabilities = arena.take_elements[Operand[Self.T]](TILE_ROWS * width)
        var rows = s.queries.largest()
        self.outputs = arena.take_elements[Self.A](rows * s.head_panels.width())
        self.largest = arena.take_elements[Self.A](rows)
        self.totals = arena.take_elements[Self.A](rows)
        self.bytes = arena.used


# --- softmax ----------------------------------------------------------------------------------------------------------


@always_inline
def larger[A: DType, n: SIMDLength, //, negative: Bool](a: SIMD[A, n], b: SIMD[A, n]) -> SIMD[A, n]:
    """The larger of each lane, or the smaller where scale is negative."""
    comptime if negative:
        return a.lt(b).select(a, b)
    else:
        return a.gt(b).select(a, b)


@always_inline
def least[negative: Bool, A: DType]() -> Scalar[A]:
    """What the largest of no scores is."""
    return Scalar[A].MAX if negative else Scalar[A].MIN


@always_inline
def fold[A: DType, n: SIMDLength, //, negative: Bool](v: SIMD[A, n]) -> Scalar[A]:
    @always_inline
    def larger_of[width: Int](a: SIMD[A, width], b: SIMD[A, width]) {} -> SIMD[A, width]:
        return larger[negative](a, b)

    return v.reduce[larger_of]()


@always_inline
def largest_of[A: DType, //, negative: Bool](row: Elements[A], keys: Int) -> Scalar[A]:
    comptime n = lanes[A]
    comptime none = least[negative, A]()
    var largest = Vector[A](none)
    var j = 0
    while j + n <= keys:
        largest = larger[negative](load[A](row.unsafe_offset(j)), largest)
        j += n
    if j < keys:
        largest = larger[negative](keep(load[A](row.unsafe_offset(j)), keys - j, none), largest)
    return fold[negative](largest)


@always_inline
def exponentials[
    T: DType
](
    row: Elements[Accumulator[T]],
    keys: Int,
    scale: Scalar[Accumulator[T]],
    origin: Scalar[Accumulator[T]],
    to: Elements[Operand[T]],
) -> Scalar[Accumulator[T]]:
    """A row of scores to their exponentials relative to `origin`; returns their sum. scale includes log2(e)."""
    comptime A = Accumulator[T]
    comptime n = lanes[A]
    var sums = Vector[A](0)
    var j = 0
    while j + n <= keys:
        var e = exp2[T](scale * (load[A](row.unsafe_offset(j)) - origin))
        sums += e
        store(to.unsafe_offset(j), e)
        j += n
    if j < keys:
        var e = keep(exp2[T](scale * (load[A](row.unsafe_offset(j)) - origin)), keys - j, 0)
        sums += e
        store(to.unsafe_offset(j), e)
    return sums.reduce_add()


@always_inline
def power[A: DType, //](x: Scalar[A]) -> Scalar[A]:
    """2^x to the precision of the accumulator."""
    comptime V = Vector[Accumulator[A]]
    return rebind[Vector[A]](exp2[A](rebind[V](Vector[A](x))))[0]


@fieldwise_init
struct Worker[T: DType, negative: Bool](ImplicitlyCopyable):
    """One thread at work on units, the blocks of queries of each head."""

    comptime A = Accumulator[Self.T]
    var p: Parameters[AttentionFwd]
    var s: Sizes[Self.T]
    var scratch: Scratch[Self.T]
    var end: Int  # of the units of this thread
    var packed: Int  # the keys that scratch holds: see `packing`

    @always_inline
    def of_head(self, x: Heads, head: Int, token: Int) -> Elements[Self.T]:
        """A token of head number `head` of the batch."""
        var H = self.p[].H
        return x.at[Self.T](head // H, token, head % H)

    def query(self, unit: Int) -> Elements[Self.T]:
        ref p = self.p[]
        var i = self.s.queries.begin(unit % self.s.queries.count)
        return self.of_head(p.q, unit // self.s.queries.count, i)

    def output(self, unit: Int) -> Elements[Self.T]:
        ref p = self.p[]
        var head = unit // self.s.queries.count
        var i = self.s.queries.begin(unit % self.s.queries.count)
        return elements[Self.T](p.out).unsafe_offset(((head // p.H * p.N + i) * p.H + head % p.H) * p.D)

    @always_inline
    def queries(self, unit: Int) -> Int:
        var block = unit % self.s.queries.count
        return self.s.queries.end(block) - self.s.queries.begin(block)

    def key(self, head: Int, j: Int) -> Elements[Self.T]:
        return self.of_head(self.p[].k, head, j)

    def value(self, head: Int, j: Int) -> Elements[Self.T]:
        return self.of_head(self.p[].v, head, j)

    @always_inline
    def packing(self, head: Int, block: Int) -> Int:
        """A number for what is packed together: the keys of a head, or a block of them."""
        return head if self.s.resident else head * self.s.key_units.count + block

    def after(self, unit: Int, block: Int) -> PrefetchQueue:
        """What is read after this block of keys: what is packed next, and the queries of the next unit."""
        ref p = self.p[]
        var queue = PrefetchQueue()
        var last = block + 1 == self.s.key_units.count
        var next_unit = unit + 1 if last else unit
        var next_block = 0 if last else block + 1
        var head = next_unit // self.s.queries.count
        if next_unit == self.end:
            return queue^
        if self.packed != self.packing(head, next_block):
            var j = 0 if self.s.resident else self.s.key_begin(next_block)
            var keys = (self.s.L if self.s.resident else self.s.key_end(next_block)) - j
            queue.add(self.key(head, j), p.k.token, keys, p.D)
            queue.add(self.value(head, j), p.v.token, keys, p.D)
        if last:
            queue.add(self.query(next_unit), p.q.token, self.queries(next_unit), p.D)
            queue.add(self.output(next_unit), p.H * p.D, self.queries(next_unit), p.D)
        return queue^

    @always_inline
    def keys_of(self, block: Int) -> Bytes:
        return self.scratch.keys.unsafe_offset(block * self.s.keys_bytes if self.s.resident else 0)

    @always_inline
    def values_of(self, block: Int) -> Bytes:
        return self.scratch.values.unsafe_offset(block * self.s.values_bytes if self.s.resident else 0)

    def pack_keys(mut self, head: Int, block: Int):
        if self.packed == self.packing(head, block):
            return
        self.packed = self.packing(head, block)
        ref p = self.p[]
        var begin = 0 if self.s.resident else block
        var end = self.s.key_units.count if self.s.resident else block + 1
        for b in range(begin, end):
            var j = self.s.key_begin(b)
            var keys = self.s.key_end(b) - j
            pack(Matrix(self.key(head, j), 1, p.k.token), p.D, keys, self.keys_of(b))
            pack(Matrix(self.value(head, j), p.v.token, 1), keys, p.D, self.values_of(b))

    def run(mut self, unit: Int):
        var head = unit // self.s.queries.count
        var tiles = Blocks.of(self.queries(unit), TILE_ROWS)
        for block in range(self.s.key_units.count):
            self.pack_keys(head, block)
            var queue = self.after(unit, block)
            for t in range(tiles.count):
                self.row_tile(unit, tiles.begin(t), tiles.end(t) - tiles.begin(t), block, queue)

    def row_tile(self, unit: Int, i: Int, rows: Int, block: Int, mut queue: PrefetchQueue):
        """Rows [i, i + rows) of a unit against one block of keys."""
        comptime A = Self.A
        ref p = self.p[]
        var keys = self.s.key_end(block) - self.s.key_begin(block)
        var width = self.s.key_panels.width()
        var head_width = self.s.head_panels.width()
        var scores = RowTile(self.scratch.scores, width, rows)
        var outputs = RowTile(self.scratch.outputs.unsafe_offset(i * head_width), head_width, rows)
        var q = Matrix(self.query(unit).unsafe_offset(i * p.q.token), p.q.token, 1)
        var operand_a = prepare_a(1, q, rows, p.D, self.scratch.queries)
        multiply[Self.T](
            operand_a.data,
            operand_a.stride,
            self.keys_of(block),
            self.s.steps,
            Panels[Self.T](keys),
            False,
            scores,
            queue,
        )
        self.softmax(i, scores, outputs, keys, block == 0)
        multiply[Self.T](
            self.scratch.probabilities.unsafe_bitcast[UInt8](),
            width * size_of[Scalar[Operand[Self.T]]](),
            self.values_of(block),
            steps_of[Self.T](keys),
            self.s.head_panels,
            block > 0,
            outputs,
            queue,
        )
        if block + 1 == self.s.key_units.count:
            self.store_rows(unit, i, outputs)

    @always_inline
    def softmax(self, i: Int, scores: RowTile[Self.A], outputs: RowTile[Self.A], keys: Int, is_first: Bool):
        """A row tile of scores to exponentials; the largest score and the total of each row are updated.

        Outputs that were summed with an older total are rescaled. All rows have their largest score before the first
        exponential: the latencies of eight reductions overlap.
        """
        comptime A = Self.A
        comptime none = least[Self.negative, A]()
        var scale = (self.p[].scale * LOG2_E).cast[A]()
        var largest = self.scratch.largest.unsafe_offset(i)
        var totals = self.scratch.totals.unsafe_offset(i)
        var now = Array[Scalar[A], TILE_ROWS](fill=0)
        for r in range(scores.rows):
            now[r] = largest_of[Self.negative](scores.row(r), keys)
        for r in range(scores.rows):
            var total = Scalar[A](0)
            if not is_first:
                now[r] = larger[Self.negative](now[r], largest[unsafe_offset=r])
            # A row of -infinity only has the total 0 and, divided by it, NaN everywhere, like the reference.
            var origin = Scalar[A](0) if now[r] == none else now[r]
            if not is_first:
                var before = largest[unsafe_offset=r]
                var factor = Scalar[A](0)
                if before != none:
                    factor = power(scale * (before - origin))
                total = totals[unsafe_offset=r] * factor
                if factor != 1:
                    var row = outputs.row(r)
                    for d in range(0, outputs.stride, lanes[A]):
                        store(row.unsafe_offset(d), factor * load[A](row.unsafe_offset(d)))
            var to = self.scratch.probabilities.unsafe_offset(r * scores.stride)
            totals[unsafe_offset=r] = total + exponentials[Self.T](scores.row(r), keys, scale, origin, to)
            largest[unsafe_offset=r] = now[r]

    def store_rows(self, unit: Int, i: Int, outputs: RowTile[Self.A]):
        comptime A = Self.A
        ref p = self.p[]
        for r in range(outputs.rows):
            var inverse = 1 / self.scratch.totals[unsafe_offset=i + r]
            var to = self.output(unit).unsafe_offset((i + r) * p.H * p.D)
            store_row(outputs.row(r), inverse, p.D, to)
            if p.stats:
                var head = unit // self.s.queries.count
                var at = head * 2 * p.N + self.s.queries.begin(unit % self.s.queries.count) + i + r
                var stats = elements[A](p.stats)
                stats[unsafe_offset=at] = self.scratch.largest[unsafe_offset=i + r]
                stats[unsafe_offset=at + p.N] = inverse


@fieldwise_init
struct Forward[T: DType, negative: Bool](Task):
    """Units are blocks of queries of a head."""

    var p: Parameters[AttentionFwd]
    var s: Sizes[Self.T]
    var bytes: Int  # of scratch memory, for each thread

    def run(self, begin: Int, end: Int, thread: Int):
        var base = Int(elements[DType.uint8](self.p[].workspace)) + thread * self.bytes
        var worker = Worker[Self.T, Self.negative](self.p, self.s, Scratch[Self.T](self.s, base), end, -1)
        for unit in range(begin, end):
            worker.run(unit)


def forward[T: DType](p: Parameters[AttentionFwd]):
    var s = Sizes[T](p[])
    var units = p[].B * p[].H * s.queries.count
    var bytes = Scratch[T](s, COUNT_ONLY).bytes
    var threads = p[].context.threads()
    if p[].scale < 0:
        parallel_for(threads, units, Forward[T, True](p, s, bytes))
    else:
        parallel_for(threads, units, Forward[T, False](p, s, bytes))


def forward_workspace[T: DType](p: AttentionFwd) -> Int:
    return Scratch[T](Sizes[T](p), COUNT_ONLY).bytes * p.context.threads()
