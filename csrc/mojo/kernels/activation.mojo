"""Activations on vectors, shared by gelu.mojo, swiglu.mojo and the epilogues of linear.mojo.

    gelu        y = x Phi(x)                 Phi(x) = (1 + erf(x / sqrt 2)) / 2
    gelu_tanh   y = x (1 + tanh(u)) / 2      u = sqrt(2 / pi) (x + 0.044715 x^3);  (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
    quick_gelu  y = x / (1 + e^-cx)          c = 1.702; silu: c = 1
    relu        y = max(x, 0)                y' = 0 at 0; NaN stays

All are written so that nothing cancels for negative x. Constants and formulas are those of csrc/cpu/activation.h.
"""

from .contract import GELU, GELU_TANH, QUICK_GELU, RELU, SILU
from .functions import LOG2_E, Layout, at_least, at_most, exp2, exp_of_sum, polynomial, quotient
from .simd import Accumulator, Vector, fma

# Phi(-a) = e^(-a^2/2) P(a) / Q(a) for 0 <= a <= limit, where Phi(-a) has become 0.
comptime P_BFLOAT16: List[Float64] = [0.500010511, 0.278018865, 0.0623702474]  # error 3e-5
comptime Q_BFLOAT16: List[Float64] = [1.0, 1.35461998, 0.701990001, 0.156161035]
comptime P_FLOAT32: List[Float64] = [0.5, 0.435255898, 0.180943539, 0.0398490366, 0.00399661197]  # error 7e-9
comptime Q_FLOAT32: List[Float64] = [1.0, 1.66839663, 1.19307158, 0.463410970, 0.0998940496, 0.0100178796]
comptime P_FLOAT64: List[Float64] = [  # error 2e-18
    0.5,
    0.82643901167628244237,
    0.67723330520669396116,
    0.35547108497401329118,
    0.13110713751106681543,
    0.035341074639996771196,
    0.007041273528835195047,
    0.0010250715693504379794,
    0.00010474310614534725494,
    6.8301227250702238895e-6,
    2.1841939157224645817e-7,
]
comptime Q_FLOAT64: List[Float64] = [
    1.0,
    2.4507625841554303211,
    2.8098922385043354009,
    1.993492032760400027,
    0.97465321348953005227,
    0.34576707665724711578,
    0.091122169470986539354,
    0.017911312346517042275,
    0.0025865939582046200867,
    0.00026309952765603220112,
    1.7120578741890866853e-5,
    5.4749622264256447185e-7,
]


@always_inline
def normal[T: DType](x: Vector[Accumulator[T]]) -> Tuple[Vector[Accumulator[T]], Vector[Accumulator[T]]]:
    """Phi(x) and e^(-x^2/2)."""
    comptime A = Accumulator[T]
    comptime V = Vector[A]
    comptime limit = 39.0 if T == DType.float64 else 15.0
    var a = at_most(abs(x), Scalar[A](limit))
    var bell: V
    var tail: V
    comptime if T == DType.bfloat16:
        bell = exp2[T](Scalar[A](-0.5 * LOG2_E) * a * a)
        tail = quotient[T](bell * polynomial[P_BFLOAT16](a), polynomial[Q_BFLOAT16](a))
    else:
        # The exponent reaches -112, where its rounding alone would cost 4e-6 of the tail: its error is carried along.
        var half = Scalar[A](-0.5) * a
        var exponent = half * a
        bell = exp_of_sum[A](exponent, fma(half, a, -exponent))
        comptime if T == DType.float32:
            tail = bell * polynomial[P_FLOAT32](a) / polynomial[Q_FLOAT32](a)
        else:
            tail = bell * polynomial[P_FLOAT64](a) / polynomial[Q_FLOAT64](a)
    return x.ge(V(0)).select(Scalar[A](1) - tail, tail), bell


@always_inline
def exp_of_tanh_argument[T: DType](x: Vector[Accumulator[T]]) -> Vector[Accumulator[T]]:
    """e^-2u."""
    comptime A = Accumulator[T]
    comptime minus_two_sqrt_2_pi_log2_e = -2.302208198144325
    var cubic = fma(Scalar[A](0.044715) * x, x, Vector[A](1))
    return exp2[T](at_most(Scalar[A](minus_two_sqrt_2_pi_log2_e) * x * cubic, Scalar[A](Layout[A].largest_exponent)))


comptime logistic_factor[activation: Int] = Float64(1.702) if activation == QUICK_GELU else Float64(1.0)
"""c of the logistic function 1 / (1 + e^-cx)."""


@always_inline
def exp_of_logistic_argument[activation: Int, T: DType](x: Vector[Accumulator[T]]) -> Vector[Accumulator[T]]:
    """e^-cx."""
    comptime A = Accumulator[T]
    comptime factor = (Float64(-LOG2_E) * logistic_factor[activation]).cast[A]()
    return exp2[T](at_most(factor * x, Scalar[A](Layout[A].largest_exponent)))


@always_inline
def activate[activation: Int, T: DType](x: Vector[Accumulator[T]]) -> Vector[Accumulator[T]]:
    comptime A = Accumulator[T]
    comptime if activation == GELU:
        return x * normal[T](x)[0]
    elif activation == GELU_TANH:
        return x / (Scalar[A](1) + exp_of_tanh_argument[T](x))
    elif activation == QUICK_GELU or activation == SILU:
        return x / (Scalar[A](1) + exp_of_logistic_argument[activation, T](x))
    elif activation == RELU:
        return x.le(Vector[A](0)).select(Vector[A](0), x)
    else:
        return x


@always_inline
def activate_grad[activation: Int, T: DType](x: Vector[Accumulator[T]]) -> Vector[Accumulator[T]]:
    """Phi(x) + x phi(x), or s + x u' s (1 - s) with s = 1 / (1 + e^-u) and 1 - s = s e^-u, u = cx or the 2u above."""
    comptime A = Accumulator[T]
    comptime V = Vector[A]
    comptime if activation == GELU:
        comptime inv_sqrt_2pi = 0.39894228040143267794
        var cdf, bell = normal[T](x)
        return fma(Scalar[A](inv_sqrt_2pi) * x, bell, cdf)
    elif activation == GELU_TANH:
        # The largest |x| for which e^-2u and its square stay finite; beyond it the result is 0 or 1.
        comptime limit = 21.0 if T == DType.float64 else 9.9
        comptime two_sqrt_2_pi = 1.59576912160573071176
        var inside = at_most(at_least(x, Scalar[A](-limit)), Scalar[A](limit))
        var e = exp_of_tanh_argument[T](inside)
        var s = Scalar[A](1) / (Scalar[A](1) + e)
        var slope = Scalar[A](two_sqrt_2_pi) * fma(Scalar[A](3 * 0.044715) * inside, inside, V(1))
        return fma(s * (s * e), inside * slope, s)
    elif activation == QUICK_GELU or activation == SILU:
        comptime factor = logistic_factor[activation].cast[A]()
        comptime largest = 350.0 if T == DType.float64 else 44.0
        var limit = Scalar[A](largest) / factor  # e^2cx stays finite, and y' is 0 or 1
        var inside = at_most(at_least(x, -limit), limit)
        var e = exp_of_logistic_argument[activation, T](inside)
        var s = Scalar[A](1) / (Scalar[A](1) + e)
        return fma(s * (s * e), factor * inside, s)
    elif activation == RELU:
        return x.le(V(0)).select(V(0), V(1))
    else:
        return V(1)
