"""Exponentials on vectors, and the logarithm of a number.

    2^x = 2^n q(x - n),  n = round(x);    e^x = 2^n p(x - n ln 2),  n = round(x / ln 2)

q and p are the polynomials of csrc/cpu/functions.h; their degree follows the type T that the result will be rounded to.
"""

import std.math
from std.memory import bitcast
from std.sys import CompilationTarget
from std.sys.intrinsics import llvm_intrinsic

from .simd import AVX512, Accumulator, Vector, fma

comptime LOG2_E = 1.4426950408889634074


@always_inline
def polynomial[A: DType, n: SIMDLength, //, c: List[Float64]](x: SIMD[A, n]) -> SIMD[A, n]:
    """c[0] + c[1] x + ... by Horner's rule."""
    comptime last = len(c) - 1
    comptime highest = c[last].cast[A]()
    var sum = SIMD[A, n](highest)
    comptime for i in range(last):
        comptime next = c[last - 1 - i].cast[A]()
        sum = fma(sum, x, SIMD[A, n](next))
    return sum


struct Layout[A: DType]:
    """The layout of a floating-point number. Adding `magic`, 1.5 * 2^mantissa_bits, rounds to an integer."""

    comptime wide = Self.A == DType.float64
    comptime Int = DType.int64 if Self.wide else DType.int32
    comptime mantissa_bits = 52 if Self.wide else 23
    comptime exponent_bias = 1023 if Self.wide else 127
    comptime magic = 6755399441055744.0 if Self.wide else 12582912.0
    comptime smallest_exponent = -1076.0 if Self.wide else -151.0  # 2^x is 0
    comptime largest_exponent = 1025.0 if Self.wide else 129.0  # 2^x is infinity


comptime EXP2_BFLOAT16: List[Float64] = [0.999928074, 0.693260986, 0.242611122, 0.0551716675]  # error 8e-5
comptime EXP2_FLOAT32: List[Float64] = [  # error 7e-8
    1.00000007,
    0.693146967,
    0.240221197,
    0.0555071328,
    0.00967554137,
    0.00132764715,
]
comptime EXP2_FLOAT64: List[Float64] = [  # error 2e-17
    1.0,
    0.693147180559945309,
    0.240226506959100761,
    0.0555041086648215826,
    0.00961812910761866557,
    0.00133335581464232131,
    0.000154035304247765276,
    1.5252733820795803e-5,
    1.32154516332214344e-6,
    1.01780672674494268e-7,
    7.07097786650813856e-9,
    4.45410341058704018e-10,
]
comptime EXP_FLOAT32: List[Float64] = [  # error 2e-9
    1.0,
    1.00000004,
    0.499999921,
    0.166664202,
    0.0416682256,
    0.00837481584,
    0.00138368464,
]
comptime EXP_FLOAT64: List[Float64] = [  # error 2e-17
    1.0,
    1.0,
    0.5,
    0.166666666666666675,
    0.0416666666666241619,
    0.00833333333333006445,
    0.00138888889171967191,
    0.000198412698630405453,
    2.48015213223686933e-5,
    2.75572684803100255e-6,
    2.76200758799833666e-7,
    2.51003758325612337e-8,
]


@always_inline
def at_least[A: DType, n: SIMDLength, //](x: SIMD[A, n], low: Scalar[A]) -> SIMD[A, n]:
    """The larger of each lane; a NaN in x stays: the comparison is false."""
    return x.lt(SIMD[A, n](low)).select(SIMD[A, n](low), x)


@always_inline
def at_most[A: DType, n: SIMDLength, //](x: SIMD[A, n], high: Scalar[A]) -> SIMD[A, n]:
    return x.gt(SIMD[A, n](high)).select(SIMD[A, n](high), x)


@always_inline
def fraction[A: DType, n: SIMDLength, //](x: SIMD[A, n]) -> SIMD[A, n]:
    """x - round(x), 0 for an infinite x (AVX-512)."""
    comptime if A == DType.float32:
        return llvm_intrinsic["llvm.x86.avx512.mask.reduce.ps.512", SIMD[A, n], has_side_effect=False](
            x, Int32(0), SIMD[A, n](0), Int16(-1), Int32(4)
        )
    else:
        return llvm_intrinsic["llvm.x86.avx512.mask.reduce.pd.512", SIMD[A, n], has_side_effect=False](
            x, Int32(0), SIMD[A, n](0), Int8(-1), Int32(4)
        )


@always_inline
def scale_by_power[A: DType, n: SIMDLength, //](x: SIMD[A, n], power: SIMD[A, n], shifted: SIMD[A, n]) -> SIMD[A, n]:
    """x 2^power for the integer power = shifted - magic."""
    comptime if AVX512 and A == DType.float32:
        return llvm_intrinsic["llvm.x86.avx512.mask.scalef.ps.512", SIMD[A, n], has_side_effect=False](
            x, power, SIMD[A, n](0), Int16(-1), Int32(4)
        )
    elif AVX512:
        return llvm_intrinsic["llvm.x86.avx512.mask.scalef.pd.512", SIMD[A, n], has_side_effect=False](
            x, power, SIMD[A, n](0), Int8(-1), Int32(4)
        )
    else:
        # Two factors, because 2^power itself may be denormal or too large.
        comptime L = Layout[A]
        comptime magic = bitcast[L.Int, 1](Scalar[A](L.magic))
        comptime bias = Scalar[L.Int](L.exponent_bias)
        comptime mantissa = Scalar[L.Int](L.mantissa_bits)
        var exponent = bitcast[L.Int, n](shifted) - SIMD[L.Int, n](magic)
        var half = exponent >> 1
        var scale1 = bitcast[A, n]((half + bias) << SIMD[L.Int, n](mantissa))
        var scale2 = bitcast[A, n]((exponent - half + bias) << SIMD[L.Int, n](mantissa))
        return x * scale1 * scale2


@always_inline
def exp2_of_fraction[T: DType](f: Vector[Accumulator[T]]) -> Vector[Accumulator[T]]:
    comptime if T == DType.bfloat16:
        return polynomial[EXP2_BFLOAT16](f)
    elif T == DType.float32:
        return polynomial[EXP2_FLOAT32](f)
    else:
        return polynomial[EXP2_FLOAT64](f)


@always_inline
def exp2[T: DType](x: Vector[Accumulator[T]]) -> Vector[Accumulator[T]]:
    """2^x to the precision of T, for x up to the largest exponent; 0 for everything below the smallest one."""
    comptime A = Accumulator[T]
    comptime if AVX512:
        var f = fraction(x)  # also of -infinity: 0
        return scale_by_power(exp2_of_fraction[T](f), x - f, x)
    else:
        var inside = at_least(x, Scalar[A](Layout[A].smallest_exponent))
        var shifted = inside + Scalar[A](Layout[A].magic)
        var n = shifted - Scalar[A](Layout[A].magic)
        return scale_by_power(exp2_of_fraction[T](inside - n), n, shifted)


@always_inline
def exp_of_sum[A: DType](x: Vector[A], rest: Vector[A]) -> Vector[A]:
    """e^(x + rest) without rounding x + rest first, for -150 < x < 88 (float32) or -1000 < x < 709 (float64)."""
    comptime wide = A == DType.float64
    comptime ln2_high = 0.693147180369123816490 if wide else 0.693359375  # n ln2_high is exact
    comptime ln2_low = 1.90821492927058770002e-10 if wide else -2.12194440e-4
    var shifted = fma(x, Vector[A](Scalar[A](LOG2_E)), Vector[A](Scalar[A](Layout[A].magic)))
    var n = shifted - Scalar[A](Layout[A].magic)
    var r = fma(n, Vector[A](Scalar[A](-ln2_low)), fma(n, Vector[A](Scalar[A](-ln2_high)), x) + rest)
    comptime if wide:
        return scale_by_power(polynomial[EXP_FLOAT64](r), n, shifted)
    else:
        return scale_by_power(polynomial[EXP_FLOAT32](r), n, shifted)


@always_inline
def quotient[T: DType](a: Vector[Accumulator[T]], b: Vector[Accumulator[T]]) -> Vector[Accumulator[T]]:
    """a / b to the precision of T, for b from 1 to 2^100: for bfloat16 the approximate reciprocal is enough."""
    comptime if AVX512 and T == DType.bfloat16:
        comptime V = Vector[Accumulator[T]]
        return a * llvm_intrinsic["llvm.x86.avx512.rcp14.ps.512", V, has_side_effect=False](b, V(0), Int16(-1))
    else:
        return a / b


comptime ATANH: List[Float64] = [  # atanh(s) / s - 1 in powers of s^2 from the first: 1 / 3, 1 / 5, ...
    0.333333333333333333333,
    0.2,
    0.142857142857142857143,
    0.111111111111111111111,
    0.0909090909090909090909,
    0.0769230769230769230769,
    0.0666666666666666666667,
    0.0588235294117647058824,
    0.0526315789473684210526,
    0.0476190476190476190476,
    0.0434782608695652173913,
]


@always_inline
def log(x: Float64) -> Float64:
    """The natural logarithm of 0 or a normal number."""
    comptime if CompilationTarget.has_fma() or CompilationTarget.has_neon():
        return std.math.log(x)
    else:
        # That of the standard library calls libm's fma here. x = 2^n m with m from sqrt(1/2) to sqrt(2), and
        # log m = 2 atanh(s) = f - s (f - 2 s^2 (1/3 + s^2 / 5 + ...)) with f = m - 1 and s = f / (f + 2).
        if not x > 0:
            return Float64(-1) / abs(x) if x == 0 else x  # -infinity or NaN
        comptime sqrt_half = 0x3FE6A09E667F3BCD
        var shifted = bitcast[DType.int64, 1](x) - sqrt_half
        var n = (shifted >> 52).cast[DType.float64]()
        var m = bitcast[DType.float64, 1]((shifted & 0xFFFFFFFFFFFFF) + sqrt_half)
        var f = m - 1
        var s = f / (f + 2)
        var z = s * s
        var small = s * (f - 2 * z * polynomial[ATANH](z))
        return n * 0.693147180369123816490 - ((small - n * 1.90821492927058770002e-10) - f)
