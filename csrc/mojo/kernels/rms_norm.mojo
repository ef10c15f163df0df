"""rms_norm: y = x rstd weight over C, rstd = 1 / sqrt(mean(x^2) + eps).

    xhat = x rstd,  g = dy weight,  dx = rstd (g - xhat mean(g xhat)),  dweight = sum over rows of dy xhat

Saved for the backward: rstd. Threads take rows, backward blocks of rows; each block leaves its own partial dweight,
which are then added in block order.
"""

from std.math import sqrt

from .contract import FLOAT64, Elements, RmsNormBwd, RmsNormFwd, elements, optional
from .rows import GROUP, RowSum, add_blocks, block_rows, cleared, for_row, load_or, unit_rows
from .simd import Accumulator, Vector, ceil_div, fma, load, store
from .threads import Task, parallel_for


@fieldwise_init
struct Forward[T: DType, P: DType](Task):
    """Units are runs of unit_rows(C) rows, at least GROUP."""

    comptime A = Accumulator[Self.T]
    var x: Elements[Self.T]
    var weight: Optional[Elements[Self.P]]
    var y: Elements[Self.T]
    var rstd: Optional[Elements[Self.A]]
    var M: Int
    var C: Int
    var x_stride: Int
    var eps: Float64
    var unit: Int  # rows

    def run(self, begin: Int, end: Int, thread: Int):
        var row = begin * self.unit
        var stop = min(end * self.unit, self.M)
        while row + GROUP <= stop:
            self.rows[GROUP](row)
            row += GROUP
        while row < stop:
            self.rows[1](row)
            row += 1

    @always_inline
    def rows[count: Int](self, row: Int):
        comptime A = Self.A
        var rstd = Array[Scalar[A], count](fill=0)
        var x = self.x.unsafe_offset(row * self.x_stride)
        var y = self.y.unsafe_offset(row * self.C)
        comptime for r in range(count):
            var squares = RowSum[A]()

            @always_inline
            def add_square(j: Int, n: Int, chain: Int) {mut squares, imm}:
                var v = load[A](x.unsafe_offset(r * self.x_stride + j), n)
                squares.chains[chain] = fma(v, v, squares.chains[chain])

            for_row[A](self.C, add_square)
            rstd[r] = 1 / sqrt(squares.total() / Scalar[A](self.C) + self.eps.cast[A]())
            if self.rstd:
                self.rstd.unsafe_value()[unsafe_offset=row + r] = rstd[r]

        @always_inline
        def scale(j: Int, n: Int, chain: Int) {imm}:
            var w = load_or[A](self.weight, j, n, 1)
            comptime for r in range(count):
                var v = load[A](x.unsafe_offset(r * self.x_stride + j), n)
                store(y.unsafe_offset(r * self.C + j), v * rstd[r] * w, n)

        for_row[A](self.C, scale)


def forward[T: DType, P: DType](p: RmsNormFwd):
    comptime A = Accumulator[T]
    var unit = max(GROUP, unit_rows(p.C))
    var task = Forward[T, P](
        elements[T](p.x),
        optional[P](p.weight),
        elements[T](p.y),
        optional[A](p.rstd),
        p.M,
        p.C,
        p.x_stride,
        p.eps,
        unit,
    )
    parallel_for(p.context.threads(), ceil_div(p.M, unit), task)


@fieldwise_init
struct Backward[T: DType, P: DType](Task):
    """Units are blocks of rows."""

    comptime A = Accumulator[Self.T]
    var dy: Elements[Self.T]
    var x: Elements[Self.T]
    var weight: Optional[Elements[Self.P]]
    var rstd: Elements[Self.A]
    var dx: Optional[Elements[Self.T]]
    var partial: Optional[Elements[Self.A]]  # [blocks, C]: dweight
    var M: Int
    var C: Int
    var x_stride: Int

    def run(self, begin: Int, end: Int, thread: Int):
        var rows = block_rows(self.M)
        for block in range(begin, end):
            var sums = cleared(self.partial, block * self.C, self.C)
            var row = block * rows
            var stop = min(row + rows, self.M)
            while row + GROUP <= stop:
                self.rows[GROUP](row, sums)
                row += GROUP
            while row < stop:
                self.rows[1](row, sums)
                row += 1

    @always_inline
    def rows[count: Int](self, row: Int, sums: Optional[Elements[Self.A]]):
        """Backward of `count` rows, their gradient of the weight added to `sums`."""
        comptime A = Self.A
        var dy = self.dy.unsafe_offset(row * self.C)
        var x = self.x.unsafe_offset(row * self.x_stride)
        var rstd = Array[Scalar[A], count](fill=0)
        var mean_gx = Array[Scalar[A], count](fill=0)
        comptime for r in range(count):
            rstd[r] = self.rstd[unsafe_offset=row + r]
            if self.dx:
                var sum_gx = RowSum[A]()

                @always_inline
                def add(j: Int, n: Int, chain: Int) {mut sum_gx, imm}:
                    var g = load[A](dy.unsafe_offset(r * self.C + j), n) * load_or[A](self.weight, j, n, 1)
                    var xhat = load[A](x.unsafe_offset(r * self.x_stride + j), n) * rstd[r]
                    sum_gx.chains[chain] = fma(g, xhat, sum_gx.chains[chain])

                for_row[A](self.C, add)
                mean_gx[r] = sum_gx.total() / Scalar[A](self.C)

        @always_inline
        def differentiate(j: Int, n: Int, chain: Int) {imm}:
            var w = load_or[A](self.weight, j, n, 1)
            var dw = Vector[A](0)
            if sums:
                dw = load[A](sums.unsafe_value().unsafe_offset(j), n)
            comptime for r in range(count):
                var d = load[A](dy.unsafe_offset(r * self.C + j), n)
                var xhat = load[A](x.unsafe_offset(r * self.x_stride + j), n) * rstd[r]
                dw = fma(d, xhat, dw)
                if self.dx:
                    var dx = self.dx.unsafe_value().unsafe_offset((row + r) * self.C + j)
                    store(dx, rstd[r] * fma(d, w, -(xhat * mean_gx[r])), n)
            if sums:
                store(sums.unsafe_value().unsafe_offset(j), dw, n)

        for_row[A](self.C, differentiate)


def backward[T: DType, P: DType](p: RmsNormBwd):
    comptime A = Accumulator[T]
    var blocks = ceil_div(p.M, block_rows(p.M))
    var threads = p.context.threads()
    var partial: Optional[Elements[A]] = None
    if p.dweight:
        partial = optional[A](p.workspace)  # null without rows
    var task = Backward[T, P](
        elements[T](p.dy),
        elements[T](p.x),
        optional[P](p.weight),
        elements[A](p.rstd),
        optional[T](p.dx),
        partial,
        p.M,
        p.C,
        p.x_stride,
    )
    parallel_for(threads, blocks, task)
    add_blocks[A, P](threads, elements[A](p.workspace), blocks, p.C, p.C, p.dweight)


def backward_workspace(p: RmsNormBwd) -> Int:
    return ceil_div(p.M, block_rows(p.M)) * p.C * (8 if Int(p.dtype) == FLOAT64 else 4)
