// GELU on vectors, shared by gelu.cpp and the epilogues of linear.cpp.
//
//   gelu       y = x Phi(x)                  Phi(x) = (1 + erf(x / sqrt 2)) / 2
//   gelu_tanh  y = x (1 + tanh(u)) / 2       u = sqrt(2 / pi) (x + 0.044715 x^3);  (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
//
// Both are written so that nothing cancels for negative x, where 1 + erf and 1 + tanh lose their digits one by one.
// T is the type that the result will be rounded to: bfloat16 takes shorter polynomials than float.
// Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
#pragma once

#include "cpu/functions.h"

namespace vit::VIT_ISA {

// Phi(-a) = e^(-a^2/2) P(a) / Q(a) for 0 <= a <= limit, where Phi(-a) has become 0. P / Q interpolates with 60 digits
// at Chebyshev nodes of a / (a + 3); all coefficients are positive, so that Horner's rule loses nothing.
template <class T>
struct NormalConstants;

template <>
struct NormalConstants<bf16> {  // error 3e-5
  static constexpr float limit = 15.0f;
  static constexpr float p[] = {0.500010511f, 0.278018865f, 0.0623702474f};
  static constexpr float q[] = {1.0f, 1.35461998f, 0.701990001f, 0.156161035f};
};

template <>
struct NormalConstants<float> {  // error 7e-9
  static constexpr float limit = 15.0f;
  static constexpr float p[] = {0.5f, 0.435255898f, 0.180943539f, 0.0398490366f, 0.00399661197f};
  static constexpr float q[] = {1.0f, 1.66839663f, 1.19307158f, 0.463410970f, 0.0998940496f, 0.0100178796f};
};

template <>
struct NormalConstants<double> {  // error 2e-18
  static constexpr double limit = 39.0;
  static constexpr double p[] = {0.5,
                                 0.82643901167628244237,
                                 0.67723330520669396116,
                                 0.35547108497401329118,
                                 0.13110713751106681543,
                                 0.035341074639996771196,
                                 0.007041273528835195047,
                                 0.0010250715693504379794,
                                 0.00010474310614534725494,
                                 6.8301227250702238895e-6,
                                 2.1841939157224645817e-7};
  static constexpr double q[] = {1.0,
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
                                 5.4749622264256447185e-7};
};

template <class A>
struct Normal {
  Vec<A> cdf;   // Phi(x)
  Vec<A> bell;  // e^(-x^2/2)
};

template <class T>
VIT_INLINE Normal<Acc<T>> normal(Vec<Acc<T>> x) {
  using A = Acc<T>;
  using C = NormalConstants<T>;
  const Vec<A> zero{};
  const Vec<A> a = at_most(abs<A>(x), C::limit);
  Vec<A> bell;
  if constexpr (same<T, bf16>) {
    bell = exp2<bf16>(A(-0.5) * Exp<A>::log2_e * a * a);
  } else {
    // The exponent reaches -112, where its rounding alone would cost 4e-6 of the tail: its error is carried along.
    const Vec<A> half = A(-0.5) * a, exponent = half * a;
    bell = exp_of_sum<A>(exponent, product_error(half, a, exponent));
  }
  const Vec<A> tail = quotient<T>(bell * polynomial(C::p, a), polynomial(C::q, a));
  return {x < zero ? tail : A(1) - tail, bell};
}

// The largest |x| for which e^-2u and its square stay finite; beyond it y' is 0 or 1.
template <class A>
inline constexpr A tanh_limit = same<A, double> ? A(21) : A(9.9);

// e^-2u, u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class T>
VIT_INLINE Vec<Acc<T>> exp_of_tanh_argument(Vec<Acc<T>> x) {
  using A = Acc<T>;
  const A minus_two_sqrt_2_pi_log2_e = A(-2.302208198144325);
  const Vec<A> cubic = fma(A(0.044715) * x, x, broadcast(A(1)));
  return exp2<T>(at_most(minus_two_sqrt_2_pi_log2_e * x * cubic, Layout<A>::largest_exponent));
}

template <class T, bool kTanh>
VIT_INLINE Vec<Acc<T>> gelu(Vec<Acc<T>> x) {
  if constexpr (kTanh)
    return x / (Acc<T>(1) + exp_of_tanh_argument<T>(x));
  else
    return x * normal<T>(x).cdf;
}

// gelu with an absolute error of 8e-5 in 13 instructions instead of 30: x (1/2 + x p(x^2)) with p fitted by least
// squares, reweighted, so that it meets Phi at the end of its interval. For values that are rounded to bfloat16 or 8
// bits and summed, as the hidden layer of the engine is; the relative error of large negative x is too large for an op.
VIT_INLINE f32v gelu_coarse(f32v x) {
  constexpr float limit = 4.2f;
  constexpr float p[] = {0.39846587f, -1.15591741f, 2.89332604f, -5.21818876f,
                         6.47679186f, -5.18884563f, 2.39268255f, -0.479267001f};  // in (x / limit)^2
  const f32v inside = at_most(at_least(x, -limit), limit);
  return x * fma(inside, polynomial(p, inside * inside * (1.0f / (limit * limit))), broadcast(0.5f));
}

// dy/dx: Phi(x) + x phi(x), or s + x 2u' s (1 - s) with s = 1 / (1 + e^-2u) and 1 - s = s e^-2u.
template <class T, bool kTanh>
VIT_INLINE Vec<Acc<T>> gelu_grad(Vec<Acc<T>> x) {
  using A = Acc<T>;
  if constexpr (kTanh) {
    x = at_most(at_least(x, -tanh_limit<A>), tanh_limit<A>);
    const Vec<A> e = exp_of_tanh_argument<T>(x);
    const Vec<A> s = A(1) / (A(1) + e);
    const A two_sqrt_2_pi = A(1.59576912160573071176);
    const Vec<A> slope = two_sqrt_2_pi * fma(A(3 * 0.044715) * x, x, broadcast(A(1)));
    return fma(s * (s * e), x * slope, s);
  } else {
    const A inv_sqrt_2pi = A(0.39894228040143267794);
    const Normal<A> at = normal<T>(x);
    return fma(inv_sqrt_2pi * x, at.bell, at.cdf);
  }
}

}  // namespace vit::VIT_ISA
