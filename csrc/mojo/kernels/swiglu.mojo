"""swiglu: y = silu(gate) x, silu(g) = g / (1 + e^-g) (activation.mojo).

    dx = dy silu(gate),  dgate = dy x silu'(gate)

Saved for the backward: x and gate. Threads take runs of rows.
"""

from .activation import activate, activate_grad
from .contract import SILU, Elements, SwigluBwd, SwigluFwd, elements
from .rows import unit_rows
from .simd import Accumulator, ceil_div, lanes, load, store
from .threads import Task, parallel_for


@fieldwise_init
struct Forward[T: DType](Task):
    """Units are runs of unit_rows(C) rows."""

    var x: Elements[Self.T]
    var gate: Elements[Self.T]
    var y: Elements[Self.T]
    var M: Int
    var C: Int
    var x_stride: Int
    var gate_stride: Int

    def run(self, begin: Int, end: Int, thread: Int):
        comptime n = lanes[Accumulator[Self.T]]
        var rows = unit_rows(self.C)
        for row in range(begin * rows, min(end * rows, self.M)):
            var j = 0
            while j + n <= self.C:
                self.vector(row, j, n)
                j += n
            if j < self.C:
                self.vector(row, j, self.C - j)

    @always_inline
    def vector(self, row: Int, j: Int, count: Int):
        comptime A = Accumulator[Self.T]
        var gate = load[A](self.gate.unsafe_offset(row * self.gate_stride + j), count)
        var x = load[A](self.x.unsafe_offset(row * self.x_stride + j), count)
        store(self.y.unsafe_offset(row * self.C + j), activate[SILU, Self.T](gate) * x, count)


@fieldwise_init
struct Backward[T: DType](Task):
    """Units are runs of unit_rows(C) rows."""

    var dy: Elements[Self.T]
    var x: Elements[Self.T]
    var gate: Elements[Self.T]
    var dx: Elements[Self.T]
    var dgate: Elements[Self.T]
    var M: Int
    var C: Int
    var x_stride: Int
    var gate_stride: Int
    var dx_stride: Int
    var dgate_stride: Int

    def run(self, begin: Int, end: Int, thread: Int):
        comptime n = lanes[Accumulator[Self.T]]
        var rows = unit_rows(self.C)
        for row in range(begin * rows, min(end * rows, self.M)):
            var j = 0
            while j + n <= self.C:
                self.vector(row, j, n)
                j += n
            if j < self.C:
                self.vector(row, j, self.C - j)

    @always_inline
    def vector(self, row: Int, j: Int, count: Int):
        comptime A = Accumulator[Self.T]
        var dy = load[A](self.dy.unsafe_offset(row * self.C + j), count)
        var gate = load[A](self.gate.unsafe_offset(row * self.gate_stride + j), count)
        var x = load[A](self.x.unsafe_offset(row * self.x_stride + j), count)
        var dgate = dy * x * activate_grad[SILU, Self.T](gate)
        store(self.dgate.unsafe_offset(row * self.dgate_stride + j), dgate, count)
        store(self.dx.unsafe_offset(row * self.dx_stride + j), dy * activate[SILU, Self.T](gate), count)


def forward[T: DType](p: SwigluFwd):
    var task = Forward[T](elements[T](p.x), elements[T](p.gate), elements[T](p.y), p.M, p.C, p.x_stride, p.gate_stride)
    parallel_for(p.context.threads(), ceil_div(p.M, unit_rows(p.C)), task)


def backward[T: DType](p: SwigluBwd):
    var task = Backward[T](
        elements[T](p.dy),
        elements[T](p.x),
        elements[T](p.gate),
        elements[T](p.dx),
        elements[T](p.dgate),
        p.M,
        p.C,
        p.x_stride,
        p.gate_stride,
        p.dx_stride,
        p.dgate_stride,
    )
    parallel_for(p.context.threads(), ceil_div(p.M, unit_rows(p.C)), task)
