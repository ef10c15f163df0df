"""linear: y = scale activation(x weight^T + bias) + residual.

    dz = scale dy activation'(preact),  dx = dz weight,  dweight = dz^T x,
    dbias = sum over rows of dz,  dscale = sum over rows of dy activation(preact)

Saved for the backward: preact = x weight^T + bias, where there is an activation or the scale has a gradient. Bias,
activation, scale and residual are applied to a tile while it is in L1. The backward first makes dz and the gradients of
bias and scale in one pass over dy; each block of rows leaves its own partial sums, and the blocks are added in order.
"""

from std.sys import size_of

from .activation import activate, activate_grad
from .contract import NONE, RELU, Elements, LinearBwd, LinearFwd, elements, optional
from .gemm import prefetch_rows, gemm, partial_bytes, store_to
from .pack import COUNT_ONLY, Arena, Matrix, OperandB, packed_b_bytes, prepare_a, prepared_a_bytes, spread_bytes
from .rows import add_blocks, cleared
from .simd import Accumulator, ceil_div, fma, lanes, load, store
from .threads import Task, parallel_for
from .tile import Bytes, Epilogue, Tile


@fieldwise_init
struct Finish[T: DType, O: DType](Epilogue):
    """What happens to a tile of x weight^T.

    The activation is chosen per tile, not per product: a product for each would be 1.5 MB of code instead of 1.
    """

    var bias: Optional[Elements[Accumulator[Self.T]]]  # [N]
    var scale: Optional[Elements[Accumulator[Self.T]]]  # [N]
    var residual: Optional[Elements[Self.O]]  # [M, N] rows `stride` apart, as all that follow
    var y: Elements[Self.O]
    var preact: Optional[Elements[Self.T]]
    var stride: Int
    var activation: Int

    @always_inline
    def prefetch(self, row: Int, rows: Int, column: Int, columns: Int):
        var at = row * self.stride + column
        prefetch_rows(self.y.unsafe_offset(at), self.stride, rows, columns)
        if self.preact:
            prefetch_rows(self.preact.unsafe_value().unsafe_offset(at), self.stride, rows, columns)
        if self.residual:
            prefetch_rows(self.residual.unsafe_value().unsafe_offset(at), self.stride, rows, columns)

    @no_inline
    def store[A: DType](self, tile: Tile[A]):
        comptime for activation in range(NONE, RELU + 1):
            if self.activation == activation:
                self.rows[activation](tile)

    @always_inline
    def rows[activation: Int, A: DType](self, tile: Tile[A]):
        comptime B = Accumulator[Self.T]
        var data = tile.data.unsafe_bitcast[Scalar[B]]()
        for r in range(tile.rows):
            var at = (tile.row + r) * self.stride + tile.column
            for j in range(0, tile.columns, lanes[B]):
                var n = tile.columns - j
                var v = load[B](data.unsafe_offset(r * tile.stride + j))
                if self.bias:
                    v += load[B](self.bias.unsafe_value().unsafe_offset(tile.column + j), n)
                if self.preact:
                    store(self.preact.unsafe_value().unsafe_offset(at + j), v, n)
                v = activate[activation, Self.T](v)
                if self.scale:
                    v *= load[B](self.scale.unsafe_value().unsafe_offset(tile.column + j), n)
                if self.residual:
                    v += load[B](self.residual.unsafe_value().unsafe_offset(at + j), n)
                store(self.y.unsafe_offset(at + j), v, n)


@fieldwise_init
struct ForwardBuffers[T: DType](TrivialRegisterPassable):
    var weight: Bytes
    var x: Bytes
    var bias: Bytes
    var bytes: Int

    def __init__(out self, p: LinearFwd, base: Int):
        var arena = Arena(base, 0)
        self.weight = arena.take(packed_b_bytes[Self.T](p.K, p.N))
        self.x = arena.take(prepared_a_bytes(Matrix(elements[Self.T](p.x), p.x_stride, 1), p.M, p.K))
        self.bias = arena.take(p.N * size_of[Scalar[Accumulator[Self.T]]]())
        self.bytes = arena.used


def forward[T: DType, P: DType, O: DType](p: LinearFwd):
    comptime A = Accumulator[T]
    var threads = p.context.threads()
    var buffers = ForwardBuffers[T](p, Int(elements[DType.uint8](p.workspace)))
    var bias: Optional[Elements[A]] = None
    if p.bias:
        var copy = buffers.bias.unsafe_bitcast[Scalar[A]]()
        for j in range(0, p.N, lanes[A]):
            store(copy.unsafe_offset(j), load[A](elements[P](p.bias).unsafe_offset(j), p.N - j), p.N - j)
        bias = copy
    var operand_b = OperandB[T, P](Matrix(elements[P](p.weight), 1, p.weight_stride), buffers.weight, p.K, p.N, True)
    var operand_a = prepare_a(threads, Matrix(elements[T](p.x), p.x_stride, 1), p.M, p.K, buffers.x)
    var finish = Finish[T, O](
        bias,
        optional[A](p.scale),
        optional[O](p.residual),
        elements[O](p.y),
        optional[T](p.preact),
        p.N,
        Int(p.activation),
    )
    gemm(threads, operand_a, operand_b, p.M, finish)


def forward_workspace[T: DType](p: LinearFwd) -> Int:
    return ForwardBuffers[T](p, COUNT_ONLY).bytes


def block_rows(M: Int) -> Int:
    """Rows of one partial sum of dbias and dscale: at most 64 blocks, so that adding the blocks stays cheap."""
    return max(32, ceil_div(M, 64))


def dz_stride[T: DType](p: LinearBwd) -> Int:
    """Elements from row to row of dz: of dy, where dz is dy itself."""
    comptime size = size_of[Scalar[T]]()
    if Int(p.activation) == NONE and not p.scale and p.dtype == p.out_dtype:
        return p.N
    return spread_bytes(p.N * size) // size


@fieldwise_init
struct BackwardBuffers[T: DType, P: DType](TrivialRegisterPassable):
    var dz: Bytes
    var sums: Bytes
    var packed: Bytes
    var copy_a: Bytes
    var partial: Bytes
    var bytes: Int

    def __init__(out self, p: LinearBwd, base: Int):
        comptime size = size_of[Scalar[Accumulator[Self.T]]]()
        var arena = Arena(base, 0)
        var dz = elements[Self.T](p.dy)
        var stride = dz_stride[Self.T](p)
        self.dz = arena.take(p.M * stride * size_of[Scalar[Self.T]]())
        self.sums = arena.take(2 * ceil_div(p.M, block_rows(p.M)) * p.N * size)
        self.packed = arena.take(max(packed_b_bytes[Self.T](p.N, p.K), packed_b_bytes[Self.T](p.M, p.K)))
        self.copy_a = arena.take(
            max(prepared_a_bytes(Matrix(dz, stride, 1), p.M, p.N), prepared_a_bytes(Matrix(dz, 1, stride), p.N, p.M))
        )
        self.partial = arena.take(partial_bytes[Self.T, Self.P](p.N, p.K))
        self.bytes = arena.used


@fieldwise_init
struct MakeDz[T: DType, O: DType, activation: Int](Task):
    """dz = scale dy activation'(preact), and of each block of rows the sums over dz and over dy activation(preact).

    Units are blocks.
    """

    comptime A = Accumulator[Self.T]
    var dy: Elements[Self.O]
    var preact: Optional[Elements[Self.T]]
    var scale: Optional[Elements[Self.A]]
    var dz: Optional[Elements[Self.T]]
    var dbias: Optional[Elements[Self.A]]  # [blocks, N]
    var dscale: Optional[Elements[Self.A]]  # likewise
    var M: Int
    var N: Int
    var stride: Int  # of dz

    def run(self, begin: Int, end: Int, thread: Int):
        comptime A = Self.A
        var rows = block_rows(self.M)
        for block in range(begin, end):
            var dbias = cleared(self.dbias, block * self.N, self.N)
            var dscale = cleared(self.dscale, block * self.N, self.N)
            for i in range(block * rows, min((block + 1) * rows, self.M)):
                for j in range(0, self.N, lanes[A]):
                    self.vector(i, j, dbias, dscale)

    @always_inline
    def vector(self, i: Int, j: Int, dbias: Optional[Elements[Self.A]], dscale: Optional[Elements[Self.A]]):
        comptime A = Self.A
        var n = self.N - j
        var at = i * self.N + j
        var v = load[A](self.dy.unsafe_offset(at), n)
        if dscale:
            var total = dscale.unsafe_value().unsafe_offset(j)
            var x = load[A](self.preact.unsafe_value().unsafe_offset(at), n)
            store(total, fma(v, activate[Self.activation, Self.T](x), load[A](total, n)), n)
        if self.scale:
            v *= load[A](self.scale.unsafe_value().unsafe_offset(j), n)
        comptime if Self.activation != NONE:
            var x = load[A](self.preact.unsafe_value().unsafe_offset(at), n)
            v *= activate_grad[Self.activation, Self.T](x)
        if self.dz:
            store(self.dz.unsafe_value().unsafe_offset(i * self.stride + j), v, n)
        if dbias:
            var total = dbias.unsafe_value().unsafe_offset(j)
            store(total, load[A](total, n) + v, n)


def backward[T: DType, P: DType, O: DType](p: LinearBwd):
    comptime A = Accumulator[T]
    var threads = p.context.threads()
    var buffers = BackwardBuffers[T, P](p, Int(elements[DType.uint8](p.workspace)))
    var blocks = ceil_div(p.M, block_rows(p.M))
    var stride = dz_stride[T](p)
    var dz = elements[T](p.dy)
    var made: Optional[Elements[T]] = None
    if T != O or Int(p.activation) != NONE or p.scale:
        dz = buffers.dz.unsafe_bitcast[Scalar[T]]()
        made = dz
    var sums_of_bias = buffers.sums.unsafe_bitcast[Scalar[A]]()
    var sums_of_scale = sums_of_bias.unsafe_offset(blocks * p.N)
    var dbias: Optional[Elements[A]] = None
    if p.dbias:
        dbias = sums_of_bias
    var dscale: Optional[Elements[A]] = None
    if p.dscale:
        dscale = sums_of_scale
    if made or dbias or dscale:
        comptime for activation in range(NONE, RELU + 1):
            if Int(p.activation) == activation:
                var task = MakeDz[T, O, activation](
                    elements[O](p.dy),
                    optional[T](p.preact),
                    optional[A](p.scale),
                    made,
                    dbias,
                    dscale,
                    p.M,
                    p.N,
                    stride,
                )
                parallel_for(threads, blocks, task)
    add_blocks[A, P](threads, sums_of_bias, blocks, p.N, p.N, p.dbias)
    add_blocks[A, A](threads, sums_of_scale, blocks, p.N, p.N, p.dscale)
    if p.dx and p.M and p.K:
        var operand_b = OperandB[T, P](
            Matrix(elements[P](p.weight), p.weight_stride, 1), buffers.packed, p.N, p.K, True
        )
        var operand_a = prepare_a(threads, Matrix(dz, stride, 1), p.M, p.N, buffers.copy_a)
        gemm(threads, operand_a, operand_b, p.M, store_to[T](elements[T](p.dx), buffers.partial, p.K))
    if p.dweight and p.N and p.K:
        var operand_b = OperandB[T, T](Matrix(elements[T](p.x), p.x_stride, 1), buffers.packed, p.M, p.K, True)
        var operand_a = prepare_a(threads, Matrix(dz, 1, stride), p.N, p.M, buffers.copy_a)
        gemm(threads, operand_a, operand_b, p.N, store_to[T](elements[P](p.dweight), buffers.partial, p.K))


def backward_workspace[T: DType, P: DType](p: LinearBwd) -> Int:
    return BackwardBuffers[T, P](p, COUNT_ONLY).bytes
