"""move: out = [lead; a] along dimension 1, plus b; a may be a sum of several views, divided by a number.

    out[i] = (i1 < leads ? lead[i] : (sum over t < terms of a[t, i0 i1-leads i2 ... i5]) / divisor) + b[i]

Threads take runs of rows of the last dimension. Terms are added in blocks of 16 and the blocks in order, so that
rounding errors grow with 16 + terms / 16 and not with the terms.
"""

from std.memory import unsafe_memset_zero

from .contract import Elements, Move, Parameters, View, elements
from .simd import Accumulator, Bits, Vector, ceil_div, copy, from_bits, lanes, load, store
from .threads import Task, parallel_for

comptime UNIT_ELEMENTS = 8192  # of one unit of work: below it a second thread costs more than it saves
comptime BLOCK = 16  # terms


@always_inline
def place[T: DType](view: View, i: Array[Int, 5], before: Int) -> Optional[Elements[T]]:
    """Row i of a view that begins `before` further along dimension 1; none where all elements are 0."""
    if not view.data:
        return None
    ref strides = view.strides
    var at = (i[1] - before) * strides[1]
    at += i[0] * strides[0] + i[2] * strides[2] + i[3] * strides[3] + i[4] * strides[4]
    return elements[T](view.data).unsafe_offset(at)


@always_inline
def gather[T: DType](row: Elements[T], stride: Int, at: Int, count: Int) -> Vector[Accumulator[T]]:
    """Elements at .. at + count - 1 of a row, `stride` apart, then zeros."""
    comptime A = Accumulator[T]
    comptime n = lanes[A]
    if stride == 1:
        return load[A](row.unsafe_offset(at), count)
    var bits = SIMD[Bits[T], n](0)
    var source = row.unsafe_bitcast[Scalar[Bits[T]]]()
    for i in range(min(n, count)):
        bits[i] = source[unsafe_offset=(at + i) * stride]
    return from_bits[T, A](bits)


@fieldwise_init
struct Rows[T: DType](Task):
    """Units are runs of `unit` rows."""

    var p: Parameters[Move]
    var rows: Int
    var unit: Int

    def run(self, begin: Int, end: Int, thread: Int):
        ref p = self.p[]
        var row = begin * self.unit
        var stop = min(end * self.unit, self.rows)
        var i = Array[Int, 5](fill=0)
        var rest = row
        for d in range(4, -1, -1):
            i[d] = rest % p.sizes[d]
            rest //= p.sizes[d]
        while row < stop:
            self.row(i, elements[Self.T](p.out).unsafe_offset(row * p.sizes[5]))
            row += 1
            var d = 4
            while d >= 0:
                i[d] += 1
                if i[d] < p.sizes[d]:
                    break
                i[d] = 0
                d -= 1

    def row(self, i: Array[Int, 5], to: Elements[Self.T]):
        ref p = self.p[]
        var more = place[Self.T](p.b, i, 0)
        if i[1] < p.leads:
            self.write(place[Self.T](p.lead, i, 0), p.lead.strides[5], 1, 1.0, more, to)
            return
        var source: Optional[Elements[Self.T]] = None
        if p.terms > 0:
            source = place[Self.T](p.a, i, p.leads)
        self.write(source, p.a.strides[5], p.terms, p.divisor, more, to)

    def write(
        self,
        source: Optional[Elements[Self.T]],
        stride: Int,
        terms: Int,
        divisor: Float64,
        more: Optional[Elements[Self.T]],
        to: Elements[Self.T],
    ):
        """A row of `terms` sums, divided, and of one more."""
        comptime n = lanes[Accumulator[Self.T]]
        ref p = self.p[]
        var columns = p.sizes[5]
        if not source and not more:
            unsafe_memset_zero(to.unsafe_bitcast[Scalar[Bits[Self.T]]](), columns)
        elif not more and terms == 1 and divisor == 1 and stride == 1:
            copy(source.unsafe_value(), to, columns)
        elif not more and terms == 1 and divisor == 1:
            var bits = source.unsafe_value().unsafe_bitcast[Scalar[Bits[Self.T]]]()
            for c in range(columns):
                to.unsafe_bitcast[Scalar[Bits[Self.T]]]()[unsafe_offset=c] = bits[unsafe_offset=c * stride]
        else:
            for c in range(0, columns, n):
                var total = Vector[Accumulator[Self.T]](0)
                if source:
                    total = self.sum(source.unsafe_value(), stride, terms, divisor, c, columns - c)
                if more:
                    total += gather[Self.T](more.unsafe_value(), p.b.strides[5], c, columns - c)
                store(to.unsafe_offset(c), total, columns - c)

    @always_inline
    def sum(
        self, source: Elements[Self.T], stride: Int, terms: Int, divisor: Float64, c: Int, count: Int
    ) -> Vector[Accumulator[Self.T]]:
        comptime A = Accumulator[Self.T]
        var term = self.p[].term
        var total = gather[Self.T](source, stride, c, count)
        var blocks = Vector[A](0)
        for t in range(1, terms):
            if t % BLOCK == 0:
                blocks += total
                total = Vector[A](0)
            total += gather[Self.T](source.unsafe_offset(t * term), stride, c, count)
        if terms >= BLOCK:
            if terms % BLOCK == 0:
                blocks += total
                total = Vector[A](0)
            total += blocks
        if divisor != 1:
            total /= Vector[A](divisor.cast[A]())
        return total


def move[T: DType](p: Parameters[Move]):
    ref n = p[].sizes
    var rows = n[0] * n[1] * n[2] * n[3] * n[4]
    if rows == 0 or n[5] == 0:
        return
    var unit = max(1, UNIT_ELEMENTS // (n[5] * max(1, p[].terms)))
    parallel_for(p[].context.threads(), ceil_div(rows, unit), Rows[T](p, rows, unit))
