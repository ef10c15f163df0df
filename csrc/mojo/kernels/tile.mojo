"""The inner product of gemm.mojo: R rows x V vectors of C in registers.

Every step loads V vectors of B and broadcasts R words of A. A step covers `depth` values of k, packed into one word: 2
for bfloat16 where an instruction sums its products in pairs, else 1. Without that instruction a word of bfloat16 is its
value as float32: taking pairs apart beside 24 accumulators, LLVM keeps all words of both halves and spills.

Signed bytes (int8) have exact sums in 32 bits. With VNNI a word is 4 of them, those of A as q + 128: the instruction
takes unsigned bytes times signed ones, and 128 times the sum of B is taken off at the end. Elsewhere a word is 2 of them
widened to 16 bits, whose products one instruction adds.
"""

from std.memory import bitcast
from std.sys import CompilationTarget, simd_width_of, size_of
from std.sys.intrinsics import PrefetchOptions, llvm_intrinsic, prefetch

from .contract import Elements
from .simd import AVX512, AVX512_BF16, VNNI, Accumulator, Vector, ceil_div, fma, lanes

comptime Bytes = Elements[DType.uint8]

comptime BYTES_DEPTH = 4 if VNNI else 2
comptime depth[T: DType] = BYTES_DEPTH if T == DType.int8 else (2 if T == DType.bfloat16 and AVX512_BF16 else 1)
comptime Word[T: DType] = DType.uint32 if depth[T] > 1 else Accumulator[T]
comptime Operand[T: DType] = T if depth[T] > 1 else Accumulator[T]
"""The type of elements that adjacent words are made of."""
comptime word_lanes[T: DType] = simd_width_of[Word[T]]()
comptime word_size[T: DType] = size_of[Scalar[Word[T]]]()
comptime Words[T: DType] = SIMD[Word[T], word_lanes[T]]
comptime VECTOR_BYTES = simd_width_of[DType.uint8]()

# The largest tile whose accumulators, one row of B and one word of A fit the registers.
comptime MANY_REGISTERS = AVX512 or CompilationTarget.has_neon()
comptime TILE_ROWS = 8 if MANY_REGISTERS else (6 if CompilationTarget.has_avx2() else 4)
comptime TILE_VECTORS = 3 if MANY_REGISTERS else 2
comptime tile_columns[T: DType] = TILE_VECTORS * word_lanes[T]

comptime COLUMNS_AHEAD = 16


@always_inline
def steps_of[T: DType](K: Int) -> Int:
    return ceil_div(K, depth[T])


@always_inline
def dot[T: DType](a: Words[T], b: Words[T], c: Vector[Accumulator[T]]) -> Vector[Accumulator[T]]:
    comptime V = Vector[Accumulator[T]]
    comptime if T == DType.int8:
        comptime U = Vector[DType.uint32]
        return rebind[V](dot_bytes(rebind[U](a), rebind[U](b), rebind[Vector[DType.int32]](c)))
    elif depth[T] == 2:
        comptime pairs = 2 * word_lanes[T]
        return llvm_intrinsic["llvm.x86.avx512bf16.dpbf16ps.512", V, has_side_effect=False](
            c, bitcast[DType.bfloat16, pairs](a), bitcast[DType.bfloat16, pairs](b)
        )
    else:
        return fma(rebind[V](a), rebind[V](b), c)


@always_inline
def dot_bytes(a: Vector[DType.uint32], b: Vector[DType.uint32], c: Vector[DType.int32]) -> Vector[DType.int32]:
    """c plus the products of the 2 or 4 values in each word."""
    comptime n = lanes[DType.int32]
    comptime V = Vector[DType.int32]
    comptime if VNNI:
        return llvm_intrinsic["llvm.x86.avx512.vpdpbusd.512", V, has_side_effect=False](
            c, bitcast[DType.int8, 4 * n](a), bitcast[DType.int8, 4 * n](b)
        )
    comptime if CompilationTarget.has_neon():
        var x = bitcast[DType.int32, n](a)
        var y = bitcast[DType.int32, n](b)
        return c + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16)
    comptime name = "llvm.x86.avx512.pmaddw.d.512" if AVX512 else (
        "llvm.x86.avx2.pmadd.wd" if CompilationTarget.has_avx2() else "llvm.x86.sse2.pmadd.wd"
    )
    var x = bitcast[DType.int16, 2 * n](a)
    return c + llvm_intrinsic[name, V, has_side_effect=False](x, bitcast[DType.int16, 2 * n](b))


@fieldwise_init
struct PrefetchStride(TrivialRegisterPassable):
    """Lines to be brought into L2 while a tile runs, one per step."""

    var first: Bytes
    var stride: Int


comptime TileFunction[T: DType] = def(
    Bytes, Int, Bytes, Int, PrefetchStride, Bool, Elements[Accumulator[T]], Int
) thin -> None


@no_inline
def tile[
    T: DType, R: Int, V: Int, columns: Bool
](
    a: Bytes,
    stride: Int,
    b: Bytes,
    steps: Int,
    lines: PrefetchStride,
    add: Bool,
    sums: Elements[Accumulator[T]],
    sums_stride: Int,
):
    """sums[R][V lanes] = A B over `steps`, or with `add` sums += A B.

    Row r, step s of A is the word at a + r stride + s word_size, or with columns at a + s stride + r word_size. b is a
    panel of V vectors per step. Each step prefetches one line of `lines`. Rows of sums are sums_stride elements
    apart.
    """
    comptime A = Accumulator[T]
    comptime size = word_size[T]
    var c = Array[Vector[A], R * V](fill=Vector[A](0))
    for s in range(steps):
        comptime if columns:
            prefetch[PrefetchOptions()](a.unsafe_offset((s + COLUMNS_AHEAD) * stride))
        else:
            prefetch[PrefetchOptions().medium_locality()](lines.first.unsafe_offset(s * lines.stride))
        var bs = Array[Words[T], V](fill=0)
        comptime for v in range(V):
            var at = b.unsafe_offset((s * V + v) * VECTOR_BYTES).unsafe_bitcast[Scalar[Word[T]]]()
            bs[v] = at.unsafe_load[width=word_lanes[T], alignment=2]()
        comptime for r in range(R):
            var at = a.unsafe_offset(s * stride + r * size if columns else r * stride + s * size)
            var word = Words[T](at.unsafe_bitcast[Scalar[Word[T]]]().unsafe_load[alignment=2]())
            comptime for v in range(V):
                c[r * V + v] = dot[T](word, bs[v], c[r * V + v])
    comptime for r in range(R):
        comptime for v in range(V):
            var at = sums.unsafe_offset(r * sums_stride + v * lanes[A])
            at.unsafe_store(at.unsafe_load[width=lanes[A]]() + c[r * V + v] if add else c[r * V + v])


@always_inline
def tile_for[T: DType, columns: Bool](rows: Int, vectors: Int) -> TileFunction[T]:
    """The tile of `rows` <= TILE_ROWS rows and `vectors` <= TILE_VECTORS vectors; the largest are used most."""
    comptime for r in range(TILE_ROWS, 1, -1):
        if rows == r:
            return tile_of[T, r, columns](vectors)
    return tile_of[T, 1, columns](vectors)


@always_inline
def tile_of[T: DType, R: Int, columns: Bool](vectors: Int) -> TileFunction[T]:
    comptime for v in range(TILE_VECTORS, 1, -1):
        if vectors == v:
            return tile[T, R, v, columns]
    return tile[T, R, 1, columns]


@fieldwise_init
struct Tile[A: DType](TrivialRegisterPassable):
    """A finished tile: rows x columns of C from (row, column), `stride` elements from row to row.

    Where the steps are blocked it holds one block's sum; first and last say which.
    """

    var data: Elements[Self.A]
    var stride: Int
    var row: Int
    var rows: Int
    var column: Int
    var columns: Int
    var first: Bool
    var last: Bool


trait Epilogue(Deinitable, ImplicitlyCopyable):
    """What happens to a finished tile, on the thread that computed it."""

    def store[A: DType](self, tile: Tile[A]):
        ...

    def prefetch(self, row: Int, rows: Int, column: Int, columns: Int):
        """Prefetches the memory that `store` will read and write, while the tile is computed."""
        ...
