"""Kernels for NVIDIA GPUs, to see what this language and the bodies of the CPU kernels come to as PTX.

No backend takes them: tests/ops/test_mojo_ptx.py compiles them for one element type at a time (-D VIT_FLOAT64, -D
VIT_BFLOAT16, else float32) and runs them on an interpreter. A vector has 16 bytes. gelu, the backward of layer_norm and
the sum of its blocks are the bodies of the CPU; a thread has a vector, a block of rows, a vector of columns. The
forward of layer_norm has a warp for a row, and matmul takes the tensor cores.
"""

from std.math import sqrt
from std.memory import bitcast
from std.sys import _RegisterPackType, is_defined, size_of
from std.sys.intrinsics import llvm_intrinsic

from kernels.contract import GELU, RELU, Elements
from kernels.gelu import Backward as GeluBackward, Forward as GeluForward
from kernels.layer_norm import Backward as LayerNormBackward
from kernels.rows import AddBlocks, block_rows, load_or
from kernels.simd import Accumulator, ceil_div, fma, keep, lanes, load, store, to_bfloat16

comptime T = DType.float64 if is_defined["VIT_FLOAT64"]() else (
    DType.bfloat16 if is_defined["VIT_BFLOAT16"]() else DType.float32
)
comptime A = Accumulator[T]
comptime WARP = 32


@always_inline
def register[name: StaticString]() -> Int:
    """A special register of PTX."""
    return Int(llvm_intrinsic["llvm.nvvm.read.ptx.sreg." + name, Int32, has_side_effect=False]())


@always_inline
def thread() -> Int:
    """The number of this thread in the launch."""
    return register["ctaid.x"]() * register["ntid.x"]() + register["tid.x"]()


@export("vit_gelu_fwd")
def gelu_fwd(x: Elements[T], y: Elements[T], n: Int, activation: Int32) abi("C"):
    """A thread for a vector."""
    var i = thread() * lanes[A]
    comptime for of in range(GELU, RELU + 1):
        if Int(activation) == of and i < n:
            GeluForward[T, of](x, y, n).vector(i, n - i)


@export("vit_gelu_bwd")
def gelu_bwd(dy: Elements[T], x: Elements[T], dx: Elements[T], n: Int, activation: Int32) abi("C"):
    var i = thread() * lanes[A]
    comptime for of in range(GELU, RELU + 1):
        if Int(activation) == of and i < n:
            GeluBackward[T, of](dy, x, dx, n).vector(i, n - i)


@always_inline
def warp_sum(x: Scalar[A]) -> Scalar[A]:
    """In every thread of a warp the sum over all of them, by halves."""
    comptime words = size_of[Scalar[A]]() // 4
    var sum = x
    comptime for step in range(5):
        var other = bitcast[DType.uint32, words](sum)
        comptime for word in range(words):
            other[word] = llvm_intrinsic["llvm.nvvm.shfl.sync.bfly.i32", UInt32](
                Int32(-1), other[word], Int32(WARP // 2 >> step), Int32(WARP - 1)
            )
        sum += bitcast[A, 1](other)
    return sum


@export("vit_layer_norm_fwd")
def layer_norm_fwd(
    x: Elements[T],
    weight: Optional[Elements[T]],
    bias: Optional[Elements[T]],
    y: Elements[T],
    mean: Elements[A],
    rstd: Elements[A],
    M: Int,
    C: Int,
    eps: Float64,
) abi("C"):
    """A warp for a row; its threads take vectors in turn. The variance takes a second pass, as on the CPU."""
    comptime V = SIMD[A, lanes[A]]
    var row = thread() // WARP
    if row >= M:
        return
    var first = thread() % WARP * lanes[A]
    var of_row = x.unsafe_offset(row * C)
    var total = V(0)
    for j in range(first, C, WARP * lanes[A]):
        total += load[A](of_row.unsafe_offset(j), C - j)
    var m = warp_sum(total.reduce_add()) / Scalar[A](C)
    var squares = V(0)
    for j in range(first, C, WARP * lanes[A]):
        var d = keep(load[A](of_row.unsafe_offset(j), C - j) - m, C - j, Scalar[A](0))
        squares = fma(d, d, squares)
    var r = 1 / sqrt(warp_sum(squares.reduce_add()) / Scalar[A](C) + eps.cast[A]())
    for j in range(first, C, WARP * lanes[A]):
        var xhat = (load[A](of_row.unsafe_offset(j), C - j) - m) * r
        var scaled = fma(xhat, load_or[A](weight, j, C - j, 1), load_or[A](bias, j, C - j, 0))
        store(y.unsafe_offset(row * C + j), scaled, C - j)
    if first == 0:
        mean[unsafe_offset=row] = m
        rstd[unsafe_offset=row] = r


@export("vit_layer_norm_bwd")
def layer_norm_bwd(
    dy: Elements[T],
    x: Elements[T],
    weight: Optional[Elements[T]],
    mean: Elements[A],
    rstd: Elements[A],
    dx: Elements[T],
    partial: Elements[A],
    M: Int,
    C: Int,
) abi("C"):
    """A thread for a block of rows, whose sums go to partial [blocks, 2, C]."""
    var block = thread()
    if block * block_rows(M) < M:
        LayerNormBackward[T, T](dy, x, weight, mean, rstd, dx, partial, M, C, C).run(block, block + 1, 0)


@export("vit_layer_norm_bwd_sums")
def layer_norm_bwd_sums(partial: Elements[A], dweight: Elements[T], dbias: Elements[T], M: Int, C: Int) abi("C"):
    """A thread for a vector of columns, and the two gradients one after the other."""
    var column = thread()
    if column * lanes[A] >= C:
        return
    var blocks = ceil_div(M, block_rows(M))
    AddBlocks[A, T](partial, dweight, blocks, 2 * C, C).run(column, column + 1, 0)
    AddBlocks[A, T](partial.unsafe_offset(C), dbias, blocks, 2 * C, C).run(column, column + 1, 0)


# ---- matmul ----

comptime MMA_M = 16
comptime MMA_N = 8
comptime MMA_K = 16
comptime COLUMNS = 8
"""Products of a warp side by side: 64 columns share the words of A."""

comptime Bits = Elements[DType.uint16]


@always_inline
def two_of(row: Bits, k: Int, K: Int, inside: Bool) -> UInt32:
    """Elements k and k + 1 of a row of K as one word, 0 where there are none."""
    if inside and k + 1 < K and K % 2 == 0:  # rows begin at a word
        return row.unsafe_offset(k).unsafe_bitcast[UInt32]()[]
    var word = UInt32(0)
    if inside and k < K:
        word = row[unsafe_offset=k].cast[DType.uint32]()
    if inside and k + 1 < K:
        word |= row[unsafe_offset=k + 1].cast[DType.uint32]() << 16
    return word


@export("vit_matmul_bf16")
def matmul_bf16(a: Bits, b: Bits, c: Bits, M: Int, N: Int, K: Int) abi("C"):
    """C [M, N] = A [M, K] B [N, K]^T of bfloat16. Blocks of one warp: 16 rows and 64 columns."""
    comptime F = Float32
    var across = ceil_div(N, MMA_N * COLUMNS)
    var lane = register["tid.x"]()
    var row = register["ctaid.x"]() // across * MMA_M + lane // 4
    var column = register["ctaid.x"]() % across * MMA_N * COLUMNS
    var sums = Array[SIMD[DType.float32, 4], COLUMNS](fill=0)
    for start in range(0, K, MMA_K):
        var k = start + lane % 4 * 2
        var upper = a.unsafe_offset(row * K)
        var lower = a.unsafe_offset((row + 8) * K)
        var a0 = two_of(upper, k, K, row < M)
        var a1 = two_of(lower, k, K, row + 8 < M)
        var a2 = two_of(upper, k + 8, K, row < M)
        var a3 = two_of(lower, k + 8, K, row + 8 < M)
        comptime for t in range(COLUMNS):
            var n = column + MMA_N * t + lane // 4
            var of_b = b.unsafe_offset(n * K)
            var b0 = two_of(of_b, k, K, n < N)
            var b1 = two_of(of_b, k + 8, K, n < N)
            var s = sums[t]
            var d = llvm_intrinsic["llvm.nvvm.mma.m16n8k16.row.col.bf16", _RegisterPackType[F, F, F, F]](
                a0, a1, a2, a3, b0, b1, s[0], s[1], s[2], s[3]
            )
            sums[t] = SIMD[DType.float32, 4](d[0], d[1], d[2], d[3])
    comptime for t in range(COLUMNS):
        var rounded = to_bfloat16(sums[t])
        comptime for i in range(4):
            var m = row + i // 2 * 8
            var n = column + MMA_N * t + lane % 4 * 2 + i % 2
            if m < M and n < N:
                c[unsafe_offset=m * N + n] = rounded[i]
