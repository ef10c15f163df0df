// Activations on vectors, shared by gelu.cpp, swiglu.cpp and the epilogues of linear.cpp.
//
//   gelu       y = x Phi(x)                  Phi(x) = (1 + erf(x / sqrt 2)) / 2
//   gelu_tanh  y = x (1 + tanh(u)) / 2       u = sqrt(2 / pi) (x + 0.044715 x^3);  (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
//   quick_gelu y = x / (1 + e^-cx)           c = 1.702; silu: c = 1
//   relu       y = max(x, 0)                y' = 0 at 0; NaN stays
//
// All are written so that nothing cancels for negative x, where 1 + erf and 1 + tanh lose their digits one by one.
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

// c of the logistic function 1 / (1 + e^-cx).
template <class A, Activation kActivation>
inline constexpr A logistic_factor = kActivation == Activation::quick_gelu ? A(1.702) : A(1);

// e^-cx.
template <class T, Activation kActivation>
VIT_INLINE Vec<Acc<T>> exp_of_logistic_argument(Vec<Acc<T>> x) {
  using A = Acc<T>;
  constexpr A factor = static_cast<A>(-1.44269504088896340736 * logistic_factor<double, kActivation>);
  return exp2<T>(at_most(factor * x, Layout<A>::largest_exponent));
}

template <class T, Activation kActivation>
VIT_INLINE Vec<Acc<T>> activate(Vec<Acc<T>> x) {
  switch (kActivation) {
    case Activation::none:
      return x;
    case Activation::gelu:
      return x * normal<T>(x).cdf;
    case Activation::gelu_tanh:
      return x / (Acc<T>(1) + exp_of_tanh_argument<T>(x));
    case Activation::quick_gelu:
    case Activation::silu:
      return x / (Acc<T>(1) + exp_of_logistic_argument<T, kActivation>(x));
    case Activation::relu: {
      const Vec<Acc<T>> zero{};
      return x <= zero ? zero : x;
    }
  }
  return x;
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

// dy/dx: Phi(x) + x phi(x), or s + x u' s (1 - s) with s = 1 / (1 + e^-u) and 1 - s = s e^-u, u = cx or the 2u above.
template <class T, Activation kActivation>
VIT_INLINE Vec<Acc<T>> activation_derivative(Vec<Acc<T>> x) {
  using A = Acc<T>;
  switch (kActivation) {
    case Activation::none:
      return broadcast(A(1));
    case Activation::gelu: {
      const A inv_sqrt_2pi = A(0.39894228040143267794);
      const Normal<A> at = normal<T>(x);
      return fma(inv_sqrt_2pi * x, at.bell, at.cdf);
    }
    case Activation::gelu_tanh: {
      x = at_most(at_least(x, -tanh_limit<A>), tanh_limit<A>);
      const Vec<A> e = exp_of_tanh_argument<T>(x);
      const Vec<A> s = A(1) / (A(1) + e);
      const A two_sqrt_2_pi = A(1.59576912160573071176);
      const Vec<A> slope = two_sqrt_2_pi * fma(A(3 * 0.044715) * x, x, broadcast(A(1)));
      return fma(s * (s * e), x * slope, s);
    }
    case Activation::quick_gelu:
    case Activation::silu: {
      constexpr A factor = logistic_factor<A, kActivation>;
      constexpr A limit = (same<A, double> ? A(350) : A(44)) / factor;  // e^2cx stays finite, and y' is 0 or 1
      x = at_most(at_least(x, -limit), limit);
      const Vec<A> e = exp_of_logistic_argument<T, kActivation>(x);
      const Vec<A> s = A(1) / (A(1) + e);
      return fma(s * (s * e), factor * x, s);
    }
    case Activation::relu: {
      const Vec<A> zero{};
      return x <= zero ? zero : broadcast(A(1));
    }
  }
  return x;
}

// Calls f(constant) with the activation known at compile time, so that a row is one branch-free loop.
template <Activation kActivation>
struct Constant {
  static constexpr Activation value = kActivation;
};
template <class F>
VIT_INLINE void with_activation(Activation activation, const F& f) {
#define VIT_CALL(name, value) \
  case Activation::name:      \
    return f(Constant<Activation::name>{});
  switch (activation) { VIT_ACTIVATIONS(VIT_CALL) }
#undef VIT_CALL
}

}  // namespace vit::VIT_ISA
