"""linear_int8: y = scale activation(x weight^T + bias) + residual, x quantized row by row, exact sums of bytes.

    x_scale = max |x| / 127,  q = x / x_scale rounded half to even,  x weight^T = (sum q weight) x_scale weight_scale

Two passes: rows of x to the words of tile.mojo, and the product, which packs the weight panel by panel. 2 M N K
operations, N K + 3 M K bytes for the passes (bfloat16).
"""

from std.memory import bitcast
from std.sys import size_of

from .activation import activate
from .contract import NONE, RELU, Elements, LinearInt8, elements, optional
from .gemm import prefetch_rows, gemm
from .pack import COUNT_ONLY, Arena, OperandA, Matrix, OperandB, packed_b_bytes, row_words
from .functions import Layout
from .simd import VNNI, Accumulator, Vector, ceil_div, lanes, load, store
from .threads import Task, parallel_for
from .tile import Bytes, Epilogue, Tile, Words, depth, dot, steps_of, word_lanes, word_size

comptime BYTE = DType.int8
comptime F32 = DType.float32
comptime LEAST: Float32 = 7.888609052210118e-31  # 2^-100: rows below it have the scale 1
comptime ZERO = 128 if VNNI else 0  # what stands for 0 in a word of x
comptime Value = DType.uint8 if VNNI else DType.int16
comptime MAGNITUDE: Int32 = 0x7FFFFFFF
comptime INFINITY: Int32 = 0x7F800000


@fieldwise_init
struct Buffers(TrivialRegisterPassable):
    var x: Bytes
    var x_scale: Elements[F32]
    var weight: Bytes
    var sums: Elements[DType.int32]
    var bytes: Int

    def __init__(out self, p: LinearInt8, base: Int):
        var arena = Arena(base, 0)
        self.x = arena.take(p.M * steps_of[BYTE](p.K) * word_size[BYTE])
        self.x_scale = arena.take_elements[F32](p.M)
        self.weight = arena.take(packed_b_bytes[BYTE](p.K, p.N))
        self.sums = arena.take_elements[DType.int32](p.N if ZERO > 0 else 0)
        self.bytes = arena.used


@always_inline
def scale_of[X: DType](row: Elements[X], K: Int) -> Float32:
    """max |x| / 127; 1 where that is tiny, NaN where an element is not finite."""
    comptime n = lanes[F32]
    var most = SIMD[DType.int32, n](0)  # of |x| as integers, which sort as floats do, infinities and NaN last
    for k in range(0, K, n):
        most = max(most, bitcast[DType.int32, n](load[F32](row.unsafe_offset(k), K - k)) & MAGNITUDE)
    var bits = most.reduce_max()
    if bits >= INFINITY:
        return bitcast[F32, 1](Int32(0x7FC00000))
    var largest = bitcast[F32, 1](bits)
    return 1 if largest < LEAST else largest / 127


@fieldwise_init
struct QuantizeRows[X: DType](Task):
    """Units are rows."""

    var x: Elements[Self.X]
    var stride: Int
    var K: Int
    var words: Bytes
    var scale: Elements[F32]

    def run(self, begin: Int, end: Int, thread: Int):
        comptime n = lanes[F32]
        # Adding the magic number rounds to an integer in the low bits of the float.
        comptime magic = Float32(Layout[F32].magic) + Float32(ZERO)
        comptime zero = bitcast[DType.int32, 1](Float32(Layout[F32].magic))
        var room = steps_of[BYTE](self.K) * depth[BYTE]
        for i in range(begin, end):
            var row = self.x.unsafe_offset(i * self.stride)
            var to = self.words.unsafe_offset(i * room * size_of[Scalar[Value]]()).unsafe_bitcast[Scalar[Value]]()
            var scale = scale_of(row, self.K)
            self.scale[unsafe_offset=i] = scale
            var divisor = Vector[F32](scale if scale == scale else 1)
            for k in range(0, self.K, n):
                var v = load[F32](row.unsafe_offset(k), self.K - k) / divisor + magic
                store(to.unsafe_offset(k), (bitcast[DType.int32, n](v) - zero).cast[Value](), self.K - k)
            for k in range(self.K, room):
                to[unsafe_offset=k] = 0  # where the weight is 0


@fieldwise_init
struct SumRows(Task):
    """ZERO times the sums of the weight's rows. Units are rows."""

    var weight: Elements[BYTE]
    var stride: Int
    var K: Int
    var sums: Elements[DType.int32]

    def run(self, begin: Int, end: Int, thread: Int):
        var ones = Words[BYTE](0x01010101)
        for i in range(begin, end):
            var row = self.weight.unsafe_offset(i * self.stride)
            var total = Vector[Accumulator[BYTE]](0)
            for s in range(0, steps_of[BYTE](self.K), word_lanes[BYTE]):
                total = dot[BYTE](ones, row_words[BYTE](row, s * depth[BYTE], self.K), total)
            self.sums[unsafe_offset=i] = total.reduce_add().cast[DType.int32]() * Int32(ZERO)


@fieldwise_init
struct Finish[O: DType](Epilogue):
    """What happens to a tile of sums."""

    var x_scale: Elements[F32]  # [M]
    var weight_scale: Elements[F32]  # [N]
    var sums: Elements[DType.int32]  # [N] to be subtracted, where ZERO is not 0
    var bias: Optional[Elements[F32]]  # [N]
    var scale: Optional[Elements[F32]]  # [N]
    var residual: Optional[Elements[Self.O]]  # [M, N] rows `stride` apart, as y
    var y: Elements[Self.O]
    var stride: Int
    var activation: Int

    @always_inline
    def prefetch(self, row: Int, rows: Int, column: Int, columns: Int):
        var at = row * self.stride + column
        prefetch_rows(self.y.unsafe_offset(at), self.stride, rows, columns)
        if self.residual:
            prefetch_rows(self.residual.unsafe_value().unsafe_offset(at), self.stride, rows, columns)

    @no_inline
    def store[A: DType](self, tile: Tile[A]):
        comptime for activation in range(NONE, RELU + 1):
            if self.activation == activation:
                self.rows[activation](tile)

    @always_inline
    def rows[activation: Int, S: DType](self, tile: Tile[S]):
        comptime A = Accumulator[Self.O]  # float32
        comptime n = lanes[A]
        var data = tile.data.unsafe_bitcast[Int32]()
        for r in range(tile.rows):
            var at = (tile.row + r) * self.stride + tile.column
            var of_row = Vector[A](self.x_scale[unsafe_offset=tile.row + r].cast[A]())
            for j in range(0, tile.columns, n):
                var count = tile.columns - j
                var column = tile.column + j
                var sum = load[DType.int32](data.unsafe_offset(r * tile.stride + j))
                comptime if ZERO > 0:
                    sum -= load[DType.int32](self.sums.unsafe_offset(column), count)
                var v = rebind[Vector[A]](sum.cast[A]())
                v *= of_row * load[A](self.weight_scale.unsafe_offset(column), count)
                if self.bias:
                    v += load[A](self.bias.unsafe_value().unsafe_offset(column), count)
                v = activate[activation, Self.O](v)
                if self.scale:
                    v *= load[A](self.scale.unsafe_value().unsafe_offset(column), count)
                if self.residual:
                    v += load[A](self.residual.unsafe_value().unsafe_offset(at + j), count)
                store(self.y.unsafe_offset(at + j), v, count)


def forward[X: DType, O: DType](p: LinearInt8):
    if p.M == 0 or p.N == 0:
        return
    var threads = p.context.threads()
    var buffers = Buffers(p, Int(elements[DType.uint8](p.workspace)))
    var weight = elements[BYTE](p.weight)
    parallel_for(threads, p.M, QuantizeRows[X](elements[X](p.x), p.x_stride, p.K, buffers.x, buffers.x_scale))
    comptime if ZERO > 0:
        parallel_for(threads, p.N, SumRows(weight, p.weight_stride, p.K, buffers.sums))
    var operand_b = OperandB[BYTE, BYTE](Matrix(weight, 1, p.weight_stride), buffers.weight, p.K, p.N, True)
    var operand_a = OperandA(buffers.x, steps_of[BYTE](p.K) * word_size[BYTE], False)
    var finish = Finish[O](
        buffers.x_scale,
        elements[F32](p.weight_scale),
        buffers.sums,
        optional[F32](p.bias),
        optional[F32](p.scale),
        optional[O](p.residual),
        elements[O](p.y),
        p.N,
        Int(p.activation),
    )
    gemm(threads, operand_a, operand_b, p.M, finish)


def workspace(p: LinearInt8) -> Int:
    return Buffers(p, COUNT_ONLY).bytes
