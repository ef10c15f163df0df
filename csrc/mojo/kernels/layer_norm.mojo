"""layer_norm: y = (x - mean) rstd weight + bias over C, rstd = 1 / sqrt(var + eps), var = mean of (x - mean)^2.

    xhat = (x - mean) rstd,  g = dy weight
    dx = rstd (g - mean(g) - xhat mean(g xhat)),  dweight = sum over rows of dy xhat,  dbias = sum over rows of dy

Saved for the backward: mean and rstd. Forward: threads take rows; the variance takes a second pass over the row (it is
in L1), because E[x^2] - E[x]^2 cancels where |mean| is large. Backward: threads take blocks of rows; each block leaves
its own partial dweight and dbias, which are then added in block order.
"""

from std.math import sqrt

from .contract import Elements, LayerNormBwd, LayerNormFwd, FLOAT64, elements, optional
from .rows import GROUP, RowSum, add_blocks, block_rows, cleared, for_row, load_or
from .simd import Accumulator, Vector, ceil_div, fma, keep, lanes, load, store
from .threads import Task, parallel_for


@fieldwise_init
struct Moments[A: DType](TrivialRegisterPassable):
    var mean: Scalar[Self.A]
    var rstd: Scalar[Self.A]


@always_inline
def moments_of[T: DType](x: Elements[T], C: Int, eps: Float64) -> Moments[Accumulator[T]]:
    comptime A = Accumulator[T]
    var total = RowSum[A]()

    @always_inline
    def add(j: Int, n: Int, chain: Int) {mut total, imm x}:
        total.chains[chain] += load[A](x.unsafe_offset(j), n)

    for_row[A](C, add)
    var mean = total.total() / Scalar[A](C)
    var squares = RowSum[A]()

    @always_inline
    def add_square(j: Int, n: Int, chain: Int) {mut squares, imm x, imm mean}:
        var d = load[A](x.unsafe_offset(j), n) - mean
        if n < lanes[A]:
            d = keep(d, n, 0)
        squares.chains[chain] = fma(d, d, squares.chains[chain])

    for_row[A](C, add_square)
    return Moments[A](mean, 1 / sqrt(squares.total() / Scalar[A](C) + eps.cast[A]()))


@fieldwise_init
struct Forward[T: DType, P: DType](Task):
    comptime A = Accumulator[Self.T]
    var x: Elements[Self.T]
    var weight: Optional[Elements[Self.P]]
    var bias: Optional[Elements[Self.P]]
    var y: Elements[Self.T]
    var mean: Optional[Elements[Self.A]]
    var rstd: Optional[Elements[Self.A]]
    var C: Int
    var x_stride: Int
    var eps: Float64

    def run(self, begin: Int, end: Int, thread: Int):
        var row = begin
        while row + GROUP <= end:
            self.rows[GROUP](row)
            row += GROUP
        while row < end:
            self.rows[1](row)
            row += 1

    @always_inline
    def rows[count: Int](self, row: Int):
        comptime A = Self.A
        var moments = Array[Moments[A], count](fill=Moments[A](0, 0))
        var x = self.x.unsafe_offset(row * self.x_stride)
        var y = self.y.unsafe_offset(row * self.C)
        comptime for r in range(count):
            moments[r] = moments_of(x.unsafe_offset(r * self.x_stride), self.C, self.eps)

        @always_inline
        def normalize(j: Int, n: Int, chain: Int) {imm}:
            var w = load_or[A](self.weight, j, n, 1)
            var b = load_or[A](self.bias, j, n, 0)
            comptime for r in range(count):
                var xhat = (load[A](x.unsafe_offset(r * self.x_stride + j), n) - moments[r].mean) * moments[r].rstd
                store(y.unsafe_offset(r * self.C + j), fma(xhat, w, b), n)

        for_row[A](self.C, normalize)
        if self.mean:
            comptime for r in range(count):
                self.mean.unsafe_value()[unsafe_offset=row + r] = moments[r].mean
                self.rstd.unsafe_value()[unsafe_offset=row + r] = moments[r].rstd


def forward[T: DType, P: DType](p: LayerNormFwd):
    comptime A = Accumulator[T]
    var task = Forward[T, P](
        elements[T](p.x),
        optional[P](p.weight),
        optional[P](p.bias),
        elements[T](p.y),
        optional[A](p.mean),
        optional[A](p.rstd),
        p.C,
        p.x_stride,
        p.eps,
    )
    parallel_for(p.context.threads(), p.M, task)


@fieldwise_init
struct Backward[T: DType, P: DType](Task):
    comptime A = Accumulator[Self.T]
    var dy: Elements[Self.T]
    var x: Elements[Self.T]
    var weight: Optional[Elements[Self.P]]
    var mean: Elements[Self.A]
    var rstd: Elements[Self.A]
    var dx: Optional[Elements[Self.T]]
    var partial: Optional[Elements[Self.A]]  # [blocks, 2, C]: dweight, dbias
    var M: Int
    var C: Int
    var x_stride: Int

    def run(self, begin: Int, end: Int, thread: Int):
        var rows = block_rows(self.M)
        for block in range(begin, end):
            var sums = cleared(self.partial, block * 2 * self.C, 2 * self.C)
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
        """Backward of `count` rows, their parameter gradients added to `sums`."""
        comptime A = Self.A
        comptime V = Vector[A]
        var dy = self.dy.unsafe_offset(row * self.C)
        var x = self.x.unsafe_offset(row * self.x_stride)
        var mean = Array[Scalar[A], count](fill=0)
        var rstd = Array[Scalar[A], count](fill=0)
        var mean_g = Array[Scalar[A], count](fill=0)
        var mean_gx = Array[Scalar[A], count](fill=0)
        comptime for r in range(count):
            mean[r] = self.mean[unsafe_offset=row + r]
            rstd[r] = self.rstd[unsafe_offset=row + r]
            if self.dx:
                var sum_g = RowSum[A]()
                var sum_gx = RowSum[A]()

                @always_inline
                def add(j: Int, n: Int, chain: Int) {mut sum_g, mut sum_gx, imm}:
                    var g = load[A](dy.unsafe_offset(r * self.C + j), n) * load_or[A](self.weight, j, n, 1)
                    var xhat = (load[A](x.unsafe_offset(r * self.x_stride + j), n) - mean[r]) * rstd[r]
                    sum_g.chains[chain] += g
                    sum_gx.chains[chain] = fma(g, xhat, sum_gx.chains[chain])

                for_row[A](self.C, add)
                mean_g[r] = sum_g.total() / Scalar[A](self.C)
                mean_gx[r] = sum_gx.total() / Scalar[A](self.C)

        @always_inline
        def differentiate(j: Int, n: Int, chain: Int) {imm}:
            var w = load_or[A](self.weight, j, n, 1)
            var dw = V(0)
            var db = V(0)
            if sums:
                dw = load[A](sums.unsafe_value().unsafe_offset(j), n)
                db = load[A](sums.unsafe_value().unsafe_offset(self.C + j), n)
            comptime for r in range(count):
                var d = load[A](dy.unsafe_offset(r * self.C + j), n)
                var xhat = (load[A](x.unsafe_offset(r * self.x_stride + j), n) - mean[r]) * rstd[r]
                dw = fma(d, xhat, dw)
                db += d
                if self.dx:
                    var dx = self.dx.unsafe_value().unsafe_offset((row + r) * self.C + j)
                    store(dx, rstd[r] * (fma(d, w, V(-mean_g[r])) - xhat * mean_gx[r]), n)
            if sums:
                store(sums.unsafe_value().unsafe_offset(j), dw, n)
                store(sums.unsafe_value().unsafe_offset(self.C + j), db, n)

        for_row[A](self.C, differentiate)


def backward[T: DType, P: DType](p: LayerNormBwd):
    comptime A = Accumulator[T]
    var blocks = ceil_div(p.M, block_rows(p.M))
    var threads = p.context.threads()
    var partial: Optional[Elements[A]] = None
    if p.dweight or p.dbias:
        partial = optional[A](p.workspace)  # null without rows
    var task = Backward[T, P](
        elements[T](p.dy),
        elements[T](p.x),
        optional[P](p.weight),
        elements[A](p.mean),
        elements[A](p.rstd),
        optional[T](p.dx),
        partial,
        p.M,
        p.C,
        p.x_stride,
    )
    parallel_for(threads, blocks, task)
    # Without rows the workspace may be null: nothing is read, the sums are 0.
    var sums = elements[A](p.workspace)
    add_blocks[A, P](threads, sums, blocks, 2 * p.C, p.C, p.dweight)
    add_blocks[A, P](threads, sums.unsafe_offset(p.C), blocks, 2 * p.C, p.C, p.dbias)


def backward_workspace(p: LayerNormBwd) -> Int:
    return ceil_div(p.M, block_rows(p.M)) * 2 * p.C * (8 if Int(p.dtype) == FLOAT64 else 4)
