"""Vectors of the level this object is compiled for: its registers decide the number of lanes.

A kernel computes in the accumulator type A (float32 or float64); load and store convert from and to the element type.
Ends of rows take the forms with a count, so that nothing beyond a row is touched.

bfloat16 exists in memory only, as its 16 bits: LLVM turns vector operations on the type itself (a masked load, a select)
into one call of __truncsfbf2 per lane on levels without AVX512_BF16, and older libgcc lacks that function.
"""

import std.math
from std.math import iota
from std.memory import bitcast
from std.sys import CompilationTarget, is_defined, simd_width_of
from std.sys.intrinsics import masked_load, masked_store

from .contract import Elements

comptime AVX512 = CompilationTarget.has_avx512f()
comptime AVX512_BF16 = is_defined["VIT_AVX512_BF16"]()
"""From the build: a feature test by name is private to the standard library."""

comptime VNNI = is_defined["VIT_AVX512_VNNI"]()

comptime Accumulator[T: DType] = DType.float64 if T == DType.float64 else (
    DType.int32 if T == DType.int8 else DType.float32
)
comptime lanes[A: DType] = simd_width_of[A]()
comptime Vector[A: DType] = SIMD[A, lanes[A]]
comptime Bits[T: DType] = DType.uint16 if T == DType.bfloat16 else T
"""The type in which an element is moved."""


@always_inline
def to_bfloat16[n: SIMDLength, //](x: SIMD[DType.float32, n]) -> SIMD[DType.uint16, n]:
    """Round to nearest even; NaN stays NaN."""
    comptime if AVX512_BF16:
        return bitcast[DType.uint16, n](x.cast[DType.bfloat16]())
    else:
        var bits = bitcast[DType.uint32, n](x)
        var rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        var quiet_nan = (bits >> 16) | 0x40
        return x.eq(x).select(rounded, quiet_nan).cast[DType.uint16]()


@always_inline
def from_bits[n: SIMDLength, //, T: DType, A: DType](bits: SIMD[Bits[T], n]) -> SIMD[A, n]:
    comptime if T == DType.bfloat16:
        return rebind[SIMD[A, n]](bitcast[DType.float32, n](bits.cast[DType.uint32]() << 16))
    else:
        return bits.cast[A]()


@always_inline
def to_bits[A: DType, n: SIMDLength, //, T: DType](x: SIMD[A, n]) -> SIMD[Bits[T], n]:
    comptime if T == DType.bfloat16:
        return rebind[SIMD[Bits[T], n]](to_bfloat16(rebind[SIMD[DType.float32, n]](x)))
    else:
        return x.cast[Bits[T]]()


@always_inline
def first[n: Int](count: Int) -> SIMD[DType.bool, n]:
    """A mask of the first `count` lanes."""
    return iota[DType.int32, n]().lt(Int32(count))


@always_inline
def load[T: DType, //, A: DType](p: Elements[T]) -> Vector[A]:
    return from_bits[T, A](p.unsafe_bitcast[Scalar[Bits[T]]]().unsafe_load[width=lanes[A]]())


@always_inline
def load[T: DType, //, A: DType](p: Elements[T], count: Int) -> Vector[A]:
    """The first `count` elements, then zeros."""
    comptime n = lanes[A]
    if count >= n:
        return load[A](p)
    return from_bits[T, A](masked_load[n](p.unsafe_bitcast[Scalar[Bits[T]]](), first[n](count), SIMD[Bits[T], n](0)))


@always_inline
def store[T: DType, A: DType, n: SIMDLength, //](p: Elements[T], x: SIMD[A, n]):
    p.unsafe_bitcast[Scalar[Bits[T]]]().unsafe_store(to_bits[T](x))


@always_inline
def store[T: DType, A: DType, n: SIMDLength, //](p: Elements[T], x: SIMD[A, n], count: Int):
    """The first `count` lanes."""
    if count >= n:
        store(p, x)
    else:
        masked_store[n](to_bits[T](x), p.unsafe_bitcast[Scalar[Bits[T]]](), first[n](count))


@always_inline
def keep[A: DType, n: SIMDLength, //](x: SIMD[A, n], count: Int, other: Scalar[A]) -> SIMD[A, n]:
    """The first `count` lanes of x, then `other`."""
    return first[n](count).select(x, SIMD[A, n](other))


@always_inline
def fma[A: DType, n: SIMDLength, //](a: SIMD[A, n], b: SIMD[A, n], c: SIMD[A, n]) -> SIMD[A, n]:
    """a b + c in one rounding where the level has FMA; elsewhere std.math.fma is a call of libm per lane."""
    comptime if CompilationTarget.has_fma() or CompilationTarget.has_neon():
        return std.math.fma(a, b, c)
    else:
        return a * b + c


@always_inline
def ceil_div(a: Int, b: Int) -> Int:
    """Of sizes, which are 0 or more: unsigned, so that no test for negative numbers remains."""
    return Int((UInt64(a) + UInt64(b) - 1) / UInt64(b))


@always_inline
def copy[T: DType, //](source: Elements[T], to: Elements[T], count: Int):
    """`count` elements as they are, NaNs included."""
    comptime n = simd_width_of[Bits[T]]()
    var bits = source.unsafe_bitcast[Scalar[Bits[T]]]()
    var copied = to.unsafe_bitcast[Scalar[Bits[T]]]()
    var i = 0
    while i + n <= count:
        copied.unsafe_offset(i).unsafe_store(bits.unsafe_offset(i).unsafe_load[width=n]())
        i += n
    while i < count:
        copied[unsafe_offset=i] = bits[unsafe_offset=i]
        i += 1
