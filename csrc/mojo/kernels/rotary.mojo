"""rotary: y = x cos + r(x) sin, where r gives each pair (a, b) of a head's elements as (-b, a): neighbours, or k and
k + D / 2.

    dx = dy cos - r(dy sin),  dcos = sum of dy x,  dsin = sum of dy r(x)

The sums run over the samples and heads that share a table: over the heads of a sample, then over the samples, both in
order. Saved for the backward: the table, and x where the table has a gradient. Threads take tokens; the table is read
once for all heads of a token.
"""

from std.math import iota
from std.utils import IndexList

from .contract import HALF, Elements, Heads, RotaryBwd, RotaryFwd, elements
from .rows import unit_rows
from .simd import Accumulator, Vector, ceil_div, copy, fma, lanes, load, store
from .threads import Task, parallel_for


@fieldwise_init
struct Tokens[T: DType](TrivialRegisterPassable):
    """Heads of a known element type."""

    var data: Elements[Self.T]
    var batch: Int
    var token: Int
    var head: Int

    @staticmethod
    def of(x: Heads) -> Self:
        return Self(elements[Self.T](x.data), x.batch, x.token, x.head)

    @always_inline
    def at(self, b: Int, n: Int, h: Int) -> Elements[Self.T]:
        return self.data.unsafe_offset(b * self.batch + n * self.token + h * self.head)


def exchanged[n: Int]() -> IndexList[n]:
    """Each lane's neighbour."""
    var indices = IndexList[n]()
    for i in range(n):
        indices[i] = i ^ 1
    return indices


@always_inline
def turned[A: DType](v: Vector[A]) -> Vector[A]:
    """Neighbours (a, b) as (-b, a)."""
    comptime n = lanes[A]
    var other = v.shuffle[exchanged[n]()](v)
    var odd = (iota[DType.int32, n]() & 1).eq(1)
    return odd.select(other, -other)


@fieldwise_init
struct Turn[T: DType, P: DType, pairing: Int, back: Bool](Task):
    """All tokens of x turned into y, or with `back` by the transpose: y = x cos - r(x sin).

    Units are runs of tokens.
    """

    var x: Tokens[Self.T]
    var table: Tokens[Self.P]
    var y: Tokens[Self.T]
    var B: Int
    var N: Int
    var H: Int
    var D: Int
    var prefix: Int

    def run(self, begin: Int, end: Int, thread: Int):
        var tokens = unit_rows(self.H * self.D)
        for token in range(begin * tokens, min(end * tokens, self.B * self.N)):
            var b = token // self.N
            var n = token % self.N
            for h in range(self.H):
                var x = self.x.at(b, n, h)
                var y = self.y.at(b, n, h)
                if n < self.prefix:
                    copy(x, y, self.D)
                else:
                    self.head(x, self.table.at(b, n - self.prefix, h), y)

    @always_inline
    def head(self, x: Elements[Self.T], sin: Elements[Self.P], y: Elements[Self.T]):
        comptime n = lanes[Accumulator[Self.T]]
        var count = self.D // 2 if Self.pairing == HALF else self.D
        var i = 0
        while i + n <= count:
            self.vector(x, sin, y, i, n)
            i += n
        if i < count:
            self.vector(x, sin, y, i, count - i)

    @always_inline
    def vector(self, x: Elements[Self.T], sin: Elements[Self.P], y: Elements[Self.T], i: Int, count: Int):
        """Elements i .. i + count - 1 of a head, and with pairing HALF those D / 2 further on."""
        comptime A = Accumulator[Self.T]
        var a = load[A](x.unsafe_offset(i), count)
        var s = load[A](sin.unsafe_offset(i), count)
        var c = load[A](sin.unsafe_offset(self.D + i), count)
        comptime if Self.pairing == HALF:
            var partner = i + self.D // 2
            var b = load[A](x.unsafe_offset(partner), count)
            var t = load[A](sin.unsafe_offset(partner), count)
            var d = load[A](sin.unsafe_offset(self.D + partner), count)
            comptime if Self.back:
                store(y.unsafe_offset(i), fma(a, c, b * t), count)
                store(y.unsafe_offset(partner), fma(b, d, -(a * s)), count)
            else:
                store(y.unsafe_offset(i), fma(a, c, -(b * s)), count)
                store(y.unsafe_offset(partner), fma(b, d, a * t), count)
        elif Self.back:
            store(y.unsafe_offset(i), fma(a, c, -turned[A](a * s)), count)
        else:
            store(y.unsafe_offset(i), fma(a, c, turned[A](a) * s), count)


@fieldwise_init
struct TableGradient[T: DType, P: DType, pairing: Int](Task):
    """Units are the rows of all tables: [table_B, table_H, N - prefix]."""

    var dy: Tokens[Self.T]
    var x: Tokens[Self.T]
    var dtable: Elements[Self.P]
    var positions: Int
    var D: Int
    var prefix: Int
    var table_B: Int
    var table_H: Int
    var samples: Int  # that share a table
    var heads: Int

    def run(self, begin: Int, end: Int, thread: Int):
        comptime n = lanes[Accumulator[Self.T]]
        var count = self.D // 2 if Self.pairing == HALF else self.D
        for row in range(begin, end):
            var token = row % self.positions + self.prefix
            var h = row // self.positions % self.table_H
            var b = row // self.positions // self.table_H
            var dsin = self.dtable.unsafe_offset(row * 2 * self.D)
            for i in range(0, count, n):
                self.vector(b, token, h, dsin, i, min(n, count - i))

    @always_inline
    def vector(self, first_b: Int, n: Int, first_h: Int, dsin: Elements[Self.P], i: Int, count: Int):
        comptime V = Vector[Accumulator[Self.T]]
        comptime A = Accumulator[Self.T]
        var partner = i + self.D // 2
        var sin_i = V(0)
        var cos_i = V(0)
        var sin_partner = V(0)
        var cos_partner = V(0)
        for b in range(first_b, first_b + self.samples):
            var s = V(0)
            var c = V(0)
            var t = V(0)
            var d = V(0)
            for h in range(first_h, first_h + self.heads):
                var x = self.x.at(b, n, h)
                var dy = self.dy.at(b, n, h)
                var xa = load[A](x.unsafe_offset(i), count)
                var ga = load[A](dy.unsafe_offset(i), count)
                c = fma(ga, xa, c)
                comptime if Self.pairing == HALF:
                    var xb = load[A](x.unsafe_offset(partner), count)
                    var gb = load[A](dy.unsafe_offset(partner), count)
                    s = fma(-ga, xb, s)
                    t = fma(gb, xa, t)
                    d = fma(gb, xb, d)
                else:
                    s = fma(ga, turned[A](xa), s)
            sin_i += s
            cos_i += c
            sin_partner += t
            cos_partner += d
        store(dsin.unsafe_offset(i), sin_i, count)
        store(dsin.unsafe_offset(self.D + i), cos_i, count)
        comptime if Self.pairing == HALF:
            store(dsin.unsafe_offset(partner), sin_partner, count)
            store(dsin.unsafe_offset(self.D + partner), cos_partner, count)


def forward[T: DType, P: DType, pairing: Int](p: RotaryFwd):
    var task = Turn[T, P, pairing, False](
        Tokens[T].of(p.x), Tokens[P].of(p.table), Tokens[T].of(p.y), p.B, p.N, p.H, p.D, p.prefix
    )
    parallel_for(p.context.threads(), ceil_div(p.B * p.N, unit_rows(p.H * p.D)), task)


def backward[T: DType, P: DType, pairing: Int](p: RotaryBwd):
    var threads = p.context.threads()
    if p.dx.data:
        var task = Turn[T, P, pairing, True](
            Tokens[T].of(p.dy), Tokens[P].of(p.table), Tokens[T].of(p.dx), p.B, p.N, p.H, p.D, p.prefix
        )
        parallel_for(threads, ceil_div(p.B * p.N, unit_rows(p.H * p.D)), task)
    if p.dtable:
        var task = TableGradient[T, P, pairing](
            Tokens[T].of(p.dy),
            Tokens[T].of(p.x),
            elements[P](p.dtable),
            p.N - p.prefix,
            p.D,
            p.prefix,
            p.table_B,
            p.table_H,
            p.B if p.table_B == 1 else 1,
            p.H if p.table_H == 1 else 1,
        )
        parallel_for(threads, p.table_B * p.table_H * (p.N - p.prefix), task)
