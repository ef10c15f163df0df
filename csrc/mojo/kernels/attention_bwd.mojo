"""attention backward: dq, dk, dv of out = P v, from the out, m and 1 / l of the forward.

    P_ij = exp(scale (q_i k_j - m_i)) / l_i
    delta_i = dout_i out_i,  dS_ij = P_ij (dout_i v_j - delta_i),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout

Key-major: a row tile of keys computes S^T = k q^T and dP^T = v dout^T for a block of queries, so that m, 1 / l and delta
are vectors along the columns and dv = P^T dout, dk = dS^T q read the row-major tiles. Only dq = dS k needs dS^T by
columns. Threads take heads, or groups of keys of a head where there are few heads; dq is the sum over the groups in
order, whoever computed them.

Longer than 400 lines: one kernel, whose parts share the scratch memory of a head.
"""

from std.sys import size_of

from .attention_tiles import Blocks, Panels, RowTile, PrefetchQueue, multiply, pack, packed_bytes, store_row
from .contract import AttentionBwd, Elements, Parameters, elements
from .functions import LOG2_E, at_most, exp2
from .pack import COUNT_ONLY, Arena, Matrix, prepare_a
from .simd import Accumulator, Vector, ceil_div, fma, lanes, load, store, to_bfloat16
from .threads import Task, parallel_for
from .tile import TILE_ROWS, Bytes, Operand, Word, depth, steps_of, word_size

# Sizes follow from N, L, D and the dtype, never from the batch or the threads: they decide the order of sums.
# (`parts` does not: it only says who computes what.)
comptime KEYS = 128  # per block: dS^T [128, 256] is 128 KB of L2
comptime KEY_GROUPS = 8  # at most: into as many parts a head can be split


def block_queries(D: Int) -> Int:
    """Four packed copies of a block of queries are 256 KB of L2."""
    return min(max(16384 // max(D, 1), 64), 256)


struct Sizes[T: DType](ImplicitlyCopyable):
    var queries: Blocks
    var groups: Blocks
    var keys: Int  # the largest block of keys
    var parts: Int  # of a head, one to a thread; whole groups of keys
    var query_panels: Panels[Self.T]
    var head_panels: Panels[Self.T]
    var steps: Int  # of a product over the head

    def __init__(out self, p: AttentionBwd):
        self.queries = Blocks(p.N, max(ceil_div(p.N, block_queries(p.D)), 1))  # without queries dk and dv are 0
        self.groups = Blocks(p.L, min(Blocks.of(p.L, KEYS).count, KEY_GROUPS))
        self.keys = Blocks.of(self.groups.largest(), KEYS).largest()
        self.query_panels = Panels[Self.T](self.queries.largest())
        self.head_panels = Panels[Self.T](p.D)
        self.steps = steps_of[Self.T](p.D)
        # As few parts as keep the threads busy; each packs the queries again, about 3 % of its work.
        var threads = max(p.context.threads(), 1)  # not checked yet where the workspace is asked for
        self.parts = 1
        var best = Int.MAX
        for n in range(1, self.groups.count + 1):
            var cost = ceil_div(p.B * p.H * n, threads) * 1000 // n * (100 + 3 * n)
            if cost < best:
                best = cost
                self.parts = n


struct Scratch[T: DType](ImplicitlyCopyable):
    """Scratch memory of one thread."""

    comptime A = Accumulator[Self.T]
    var queries_t: Bytes  # packed [D, queries]
    var douts_t: Bytes
    var queries: Bytes  # packed [queries, D]
    var douts: Bytes
    var keys: Bytes  # packed [keys, D]
    var key_rows: Bytes  # row tiles, where their words cannot be read in place
    var value_rows: Bytes
    var largest: Elements[Self.A]  # of each query: m, 1 / l and delta
    var inverse: Elements[Self.A]
    var delta: Elements[Self.A]
    var scores: Elements[Self.A]  # row tiles
    var dscores: Elements[Self.A]
    var probabilities: Elements[Operand[Self.T]]  # [TILE_ROWS, query_panels.width()]
    var ds: Elements[Operand[Self.T]]
    var ds_words: Elements[Word[Self.T]]  # [steps of keys, query_panels.width()]
    var dkeys: Elements[Self.A]  # row tiles of a part, or a single one where there is one block of queries
    var dvalues: Elements[Self.A]
    var dqueries: Elements[Self.A]  # [groups] row tiles of a block of queries, where a head is one part
    var bytes: Int

    def __init__(out self, s: Sizes[Self.T], D: Int, base: Int):
        var arena = Arena(base, 0)
        var width = s.query_panels.width()
        var rows = s.queries.largest()
        self.queries_t = arena.take(packed_bytes[Self.T](D, rows))
        self.douts_t = arena.take(packed_bytes[Self.T](D, rows))
        self.queries = arena.take(packed_bytes[Self.T](rows, D))
        self.douts = arena.take(packed_bytes[Self.T](rows, D))
        self.keys = arena.take(packed_bytes[Self.T](s.keys, D))
        self.key_rows = arena.take(TILE_ROWS * s.steps * word_size[Self.T])
        self.value_rows = arena.take(TILE_ROWS * s.steps * word_size[Self.T])
        self.largest = arena.take_elements[Self.A](width)
        self.inverse = arena.take_elements[Self.A](width)
        self.delta = arena.take_elements[Self.A](width)
        self.scores = arena.take_elements[Self.A](TILE_ROWS * width)
        self.dscores = arena.take_elements[Self.A](TILE_ROWS * width)
        self.probabilities = arena.take_elements[Operand[Self.T]](TILE_ROWS * width)
        self.ds = arena.take_elements[Operand[Self.T]](TILE_ROWS * width)
        self.ds_words = arena.take_elements[Word[Self.T]](steps_of[Self.T](s.keys) * width)
        var kept = (TILE_ROWS if s.queries.count == 1 else s.groups.size) * s.head_panels.width()
        self.dkeys = arena.take_elements[Self.A](kept)
        self.dvalues = arena.take_elements[Self.A](kept)
        self.dqueries = arena.take_elements[Self.A](0 if s.parts > 1 else s.groups.count * rows * s.head_panels.width())
        self.bytes = arena.used


@fieldwise_init
struct Head[T: DType](ImplicitlyCopyable):
    """One head at work: its tensors, and the scratch memory of the thread."""

    comptime A = Accumulator[Self.T]
    var p: Parameters[AttentionBwd]
    var s: Sizes[Self.T]
    var scratch: Scratch[Self.T]
    var q: Elements[Self.T]
    var k: Elements[Self.T]
    var v: Elements[Self.T]
    var dout: Elements[Self.T]
    var out: Elements[Self.T]
    var stats: Elements[Self.A]
    var dq: Elements[Self.T]
    var dk: Elements[Self.T]
    var dv: Elements[Self.T]

    def __init__(out self, params: Parameters[AttentionBwd], s: Sizes[Self.T], scratch: Scratch[Self.T], head: Int):
        ref p = params[]
        var b = head // p.H
        var h = head % p.H
        var row = (b * p.N * p.H + h) * p.D
        self.p = params
        self.s = s
        self.scratch = scratch
        self.q = p.q.at[Self.T](b, 0, h)
        self.k = p.k.at[Self.T](b, 0, h)
        self.v = p.v.at[Self.T](b, 0, h)
        self.dout = elements[Self.T](p.dout).unsafe_offset(row)
        self.out = elements[Self.T](p.out).unsafe_offset(row)
        self.stats = elements[Self.A](p.stats).unsafe_offset(head * 2 * p.N)
        self.dq = p.dq.at[Self.T](b, 0, h)
        self.dk = p.dk.at[Self.T](b, 0, h)
        self.dv = p.dv.at[Self.T](b, 0, h)

    def take_queries(self, i: Int, n: Int):
        """Packs queries [i, i + n) and computes their delta."""
        comptime A = Self.A
        ref p = self.p[]
        var token = p.H * p.D
        var q = self.q.unsafe_offset(i * p.q.token)
        var dout = self.dout.unsafe_offset(i * token)
        var out = self.out.unsafe_offset(i * token)
        pack(Matrix(q, 1, p.q.token), p.D, n, self.scratch.queries_t)
        pack(Matrix(dout, 1, token), p.D, n, self.scratch.douts_t)
        pack(Matrix(q, p.q.token, 1), n, p.D, self.scratch.queries)
        pack(Matrix(dout, token, 1), n, p.D, self.scratch.douts)
        for r in range(n):
            var products = Vector[A](0)
            for d in range(0, p.D, lanes[A]):
                var at = r * token + d
                var x = load[A](dout.unsafe_offset(at), p.D - d)
                products = fma(x, load[A](out.unsafe_offset(at), p.D - d), products)
            self.scratch.delta[unsafe_offset=r] = products.reduce_add()
            self.scratch.largest[unsafe_offset=r] = self.stats[unsafe_offset=i + r]
            self.scratch.inverse[unsafe_offset=r] = self.stats[unsafe_offset=p.N + i + r]
        for r in range(n, self.s.query_panels.width()):  # padding: a probability of 0
            self.scratch.delta[unsafe_offset=r] = 0
            self.scratch.largest[unsafe_offset=r] = 0
            self.scratch.inverse[unsafe_offset=r] = 0

    def differentiate(self, scores: RowTile[Self.A], dscores: RowTile[Self.A], columns: Int, step: Int):
        """P and dS of a row tile of keys from S^T and dP^T; dS also as words, from step `step` on."""
        comptime A = Self.A
        comptime V = Vector[A]
        comptime n = lanes[A]
        var scale = V((self.p[].scale * LOG2_E).cast[A]())
        var width = scores.stride
        var r = 0
        while r < scores.rows:
            for i in range(0, columns, n):
                var largest = load[A](self.scratch.largest.unsafe_offset(i))
                var inverse = load[A](self.scratch.inverse.unsafe_offset(i))
                var delta = load[A](self.scratch.delta.unsafe_offset(i))
                var d = Array[V, depth[Self.T]](fill=V(0))
                comptime for half in range(depth[Self.T]):
                    if r + half < scores.rows:
                        var at = (r + half) * width + i
                        # The difference first, as in the forward: not rounded at the size of the scores. Above 0 it
                        # can only be by rounding, which at huge scores would overflow.
                        var exponent = scale * (load[A](scores.data.unsafe_offset(at)) - largest)
                        var e = exp2[Self.T](at_most(exponent, Scalar[A](0))) * inverse
                        d[half] = e * (load[A](dscores.data.unsafe_offset(at)) - delta)
                        store(self.scratch.probabilities.unsafe_offset(at), e)
                        store(self.scratch.ds.unsafe_offset(at), d[half])
                var words = self.scratch.ds_words.unsafe_offset((step + r // depth[Self.T]) * width + i)
                comptime if depth[Self.T] == 2:
                    var low = to_bfloat16(rebind[Vector[DType.float32]](d[0])).cast[DType.uint32]()
                    var high = to_bfloat16(rebind[Vector[DType.float32]](d[1])).cast[DType.uint32]()
                    words.unsafe_bitcast[UInt32]().unsafe_store(low | high << 16)
                else:
                    words.unsafe_bitcast[Scalar[A]]().unsafe_store(d[0])
            r += depth[Self.T]

    def prefetch_queries(self, block: Int, mut queue: PrefetchQueue):
        """The rows that are read first of a block of queries."""
        ref p = self.p[]
        var i = self.s.queries.begin(block)
        var n = self.s.queries.end(block) - i
        var token = p.H * p.D
        queue.add(self.q.unsafe_offset(i * p.q.token), p.q.token, n, p.D)
        queue.add(self.dout.unsafe_offset(i * token), token, n, p.D)
        queue.add(self.out.unsafe_offset(i * token), token, n, p.D)

    def prefetch_keys(self, j: Int, n: Int, mut queue: PrefetchQueue):
        ref p = self.p[]
        queue.add(self.k.unsafe_offset(j * p.k.token), p.k.token, n, p.D)
        queue.add(self.v.unsafe_offset(j * p.v.token), p.v.token, n, p.D)
        queue.add(self.dk.unsafe_offset(j * p.dk.token), p.dk.token, n, p.D)
        queue.add(self.dv.unsafe_offset(j * p.dv.token), p.dv.token, n, p.D)

    def run(
        self,
        block: Int,
        begin: Int,
        end: Int,
        dqueries: Elements[Self.A],
        stride: Int,
        next: Optional[Self],
        next_block: Int,
    ):
        """A block of queries with the groups of keys [begin, end): dk and dv, and each group's sum of dq to dqueries,
        `stride` elements apart. `next` and its block are what follows.
        """
        var i = self.s.queries.begin(block)
        var n = self.s.queries.end(block) - i
        self.take_queries(i, n)
        for group in range(begin, end):
            var start = self.s.groups.begin(group)
            var blocks = Blocks.of(self.s.groups.end(group) - start, KEYS)
            for c in range(blocks.count):
                var j = start + blocks.begin(c)
                var keys = blocks.end(c) - blocks.begin(c)
                var queue = PrefetchQueue()
                if group + 1 < end or c + 1 < blocks.count:
                    self.prefetch_keys(j + keys, min(self.s.keys, self.p[].L - j - keys), queue)
                elif next:
                    next.unsafe_value().prefetch_queries(next_block, queue)
                self.key_block(block, n, j, keys, c > 0, dqueries.unsafe_offset(group * stride), queue)

    def key_block(
        self, block: Int, n: Int, j: Int, keys: Int, add: Bool, dqueries: Elements[Self.A], mut queue: PrefetchQueue
    ):
        comptime A = Self.A
        comptime T2 = Self.T  # shorter lines below
        comptime pair = depth[Self.T]
        comptime size = size_of[Scalar[Operand[Self.T]]]()
        ref p = self.p[]
        ref scratch = self.scratch
        var width = self.s.query_panels.width()
        var head_width = self.s.head_panels.width()
        var panels = Panels[Self.T](n)
        var k = self.k.unsafe_offset(j * p.k.token)
        var v = self.v.unsafe_offset(j * p.v.token)
        pack(Matrix(k, p.k.token, 1), keys, p.D, scratch.keys)
        var tiles = Blocks(steps_of[Self.T](keys), ceil_div(keys, TILE_ROWS))  # whole steps: pairs of keys share a word
        for t in range(tiles.count):
            var row = tiles.begin(t) * pair
            var rows = min(tiles.end(t) * pair, keys) - row
            var scores = RowTile(scratch.scores, width, rows)
            var dscores = RowTile(scratch.dscores, width, rows)
            var key_rows = prepare_a(
                1, Matrix(k.unsafe_offset(row * p.k.token), p.k.token, 1), rows, p.D, scratch.key_rows
            )
            var value_rows = prepare_a(
                1, Matrix(v.unsafe_offset(row * p.v.token), p.v.token, 1), rows, p.D, scratch.value_rows
            )
            var steps = self.s.steps
            multiply[T2](key_rows.data, key_rows.stride, scratch.queries_t, steps, panels, False, scores, queue)
            multiply[T2](value_rows.data, value_rows.stride, scratch.douts_t, steps, panels, False, dscores, queue)
            self.differentiate(scores, dscores, panels.width(), tiles.begin(t))
            var kept = 0 if self.s.queries.count == 1 else (j + row) * head_width
            var dkeys = RowTile(scratch.dkeys.unsafe_offset(kept), head_width, rows)
            var dvalues = RowTile(scratch.dvalues.unsafe_offset(kept), head_width, rows)
            var probabilities = scratch.probabilities.unsafe_bitcast[UInt8]()
            var ds = scratch.ds.unsafe_bitcast[UInt8]()
            var of_queries = steps_of[Self.T](n)
            var later = block > 0
            multiply[T2](
                probabilities, width * size, scratch.douts, of_queries, self.s.head_panels, later, dvalues, queue
            )
            multiply[T2](ds, width * size, scratch.queries, of_queries, self.s.head_panels, later, dkeys, queue)
            if block + 1 < self.s.queries.count:
                continue
            for r in range(rows):
                var at = j + row + r
                store_row(dvalues.row(r), Scalar[A](1), p.D, self.dv.unsafe_offset(at * p.dv.token))
                store_row(dkeys.row(r), p.scale.cast[A](), p.D, self.dk.unsafe_offset(at * p.dk.token))
        var query_tiles = Blocks.of(n, TILE_ROWS)
        for t in range(query_tiles.count):
            var row = query_tiles.begin(t)
            multiply[T2, True](
                scratch.ds_words.unsafe_offset(row).unsafe_bitcast[UInt8](),
                width * word_size[Self.T],
                scratch.keys,
                steps_of[Self.T](keys),
                self.s.head_panels,
                add,
                RowTile(dqueries.unsafe_offset(row * head_width), head_width, query_tiles.end(t) - row),
                queue,
            )

    def store_queries(self, block: Int, dqueries: Elements[Self.A], stride: Int):
        """dq of one block of queries: the sum of its groups, `stride` elements apart, in order."""
        comptime A = Self.A
        ref p = self.p[]
        var i = self.s.queries.begin(block)
        var n = self.s.queries.end(block) - i
        var head_width = self.s.head_panels.width()
        for group in range(1, self.s.groups.count):
            for at in range(0, n * head_width, lanes[A]):
                var sum = load[A](dqueries.unsafe_offset(at)) + load[A](dqueries.unsafe_offset(group * stride + at))
                store(dqueries.unsafe_offset(at), sum)
        for r in range(n):
            var to = self.dq.unsafe_offset((i + r) * p.dq.token)
            store_row(dqueries.unsafe_offset(r * head_width), p.scale.cast[A](), p.D, to)


@fieldwise_init
struct Backward[T: DType](Task):
    """Units are parts of a head."""

    comptime A = Accumulator[Self.T]
    var p: Parameters[AttentionBwd]
    var s: Sizes[Self.T]
    var bytes: Int  # of scratch memory, for each thread
    var shared: Elements[Self.A]  # where the parts of a head meet: [head, group, N, width]

    def run(self, begin: Int, end: Int, thread: Int):
        ref p = self.p[]
        var s = self.s
        var width = s.head_panels.width()
        var scratch = Scratch[Self.T](s, p.D, Int(elements[DType.uint8](p.workspace)) + thread * self.bytes)
        var parts = Blocks(s.groups.count, s.parts)
        for unit in range(begin, end):
            var head = Head[Self.T](self.p, s, scratch, unit // s.parts)
            var part = unit % s.parts
            for block in range(s.queries.count):
                var next: Optional[Head[Self.T]] = None
                var next_block = 0
                if block + 1 < s.queries.count:
                    next = head
                    next_block = block + 1
                elif unit + 1 < end:
                    next = Head[Self.T](self.p, s, scratch, (unit + 1) // s.parts)
                var dqueries = scratch.dqueries
                var stride = s.queries.largest() * width
                if s.parts > 1:
                    stride = p.N * width
                    var at = unit // s.parts * s.groups.count * stride + s.queries.begin(block) * width
                    dqueries = self.shared.unsafe_offset(at)
                head.run(block, parts.begin(part), parts.end(part), dqueries, stride, next, next_block)
                if s.parts == 1:
                    head.store_queries(block, dqueries, stride)


@fieldwise_init
struct Meet[T: DType](Task):
    """dq of the heads that were several parts. Units are blocks of queries of a head."""

    comptime A = Accumulator[Self.T]
    var p: Parameters[AttentionBwd]
    var s: Sizes[Self.T]
    var bytes: Int
    var shared: Elements[Self.A]

    def run(self, begin: Int, end: Int, thread: Int):
        ref p = self.p[]
        var width = self.s.head_panels.width()
        var stride = p.N * width
        var scratch = Scratch[Self.T](self.s, p.D, Int(elements[DType.uint8](p.workspace)) + thread * self.bytes)
        for unit in range(begin, end):
            var block = unit % self.s.queries.count
            var head = unit // self.s.queries.count
            var at = head * self.s.groups.count * stride + self.s.queries.begin(block) * width
            Head[Self.T](self.p, self.s, scratch, head).store_queries(block, self.shared.unsafe_offset(at), stride)


def backward[T: DType](p: Parameters[AttentionBwd]):
    comptime A = Accumulator[T]
    var s = Sizes[T](p[])
    var heads = p[].B * p[].H
    var threads = p[].context.threads()
    var bytes = Scratch[T](s, p[].D, COUNT_ONLY).bytes
    var shared = elements[DType.uint8](p[].workspace).unsafe_offset(threads * bytes).unsafe_bitcast[Scalar[A]]()
    parallel_for(threads, heads * s.parts, Backward[T](p, s, bytes, shared))
    if s.parts > 1:
        parallel_for(threads, heads * s.queries.count, Meet[T](p, s, bytes, shared))


def backward_workspace[T: DType](p: AttentionBwd) -> Int:
    var s = Sizes[T](p)
    var size = s.groups.count * p.N * s.head_panels.width() * size_of[Scalar[Accumulator[T]]]()
    var shared = p.B * p.H * size if s.parts > 1 else 0
    return p.context.threads() * Scratch[T](s, p.D, COUNT_ONLY).bytes + shared
