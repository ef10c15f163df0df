// Activations and their derivatives on one accumulator.
//
//   gelu       y = x Phi(x)              Phi(-a) = e^(-a^2/2) P(a) / Q(a) for a >= 0, a quotient of polynomials with
//              positive coefficients only (nothing cancels), relative error 7e-9; float64 uses erfc.
//   gelu_tanh  y = x / (1 + e^-2u)       u = sqrt(2 / pi) (x + 0.044715 x^3)
//   quick_gelu y = x / (1 + e^-cx)       c = 1.702; silu: c = 1
//   relu       y = max(x, 0)            y' = 0 at 0; NaN stays
//
// Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
#pragma once

#include "codes.h"
#include "functions.h"

using vit::Activation;

template <class A>
struct Normal {
  A cdf;   // Phi(x)
  A bell;  // e^(-x^2/2)
};

VIT_INLINE Normal<float> normal(float x) {
  float a = sycl::fabs(x);
  const bool far = a >= 13.0f;  // there Phi(-a) is 6e-39 and less; a NaN is not
  a = far ? 13.0f : a;
  const float bell = far ? 0.0f : exponential_of_negative(-0.5f * a * a);
  float p = 0.00399661197f, q = 0.0100178796f;
  p = sycl::fma(p, a, 0.0398490366f), q = sycl::fma(q, a, 0.0998940496f);
  p = sycl::fma(p, a, 0.180943539f), q = sycl::fma(q, a, 0.463410970f);
  p = sycl::fma(p, a, 0.435255898f), q = sycl::fma(q, a, 1.19307158f);
  p = sycl::fma(p, a, 0.5f), q = sycl::fma(q, a, 1.66839663f);
  q = sycl::fma(q, a, 1.0f);
  const float tail = bell * p / q;
  return {x < 0 ? tail : 1.0f - tail, bell};
}

VIT_INLINE Normal<double> normal(double x) {
  return {0.5 * sycl::erfc(x * -0.70710678118654752440), exponential(-0.5 * x * x)};
}

// 1 / (1 + e^-2u)
template <class A>
VIT_INLINE A tanh_gate(A x) {
  return A(1) / (A(1) + exponential(x * -(A(1.5957691216057308) + A(0.071354816272600248) * x * x)));
}

// 1 / (1 + e^-u)
template <class A>
VIT_INLINE A logistic(A u) {
  return A(1) / (A(1) + exponential(-u));
}

// The derivative of x / (1 + e^-cx).
template <class A>
VIT_INLINE A logistic_derivative(A x, A c) {
  const A limit = sizeof(A) == 8 ? A(350) : A(44);  // beyond it the derivative is 0 or 1
  A u = c * x;
  u = u > limit ? limit : u < -limit ? -limit : u;
  const A gate = logistic(u);
  return sycl::fma(gate * logistic(-u), u, gate);
}

template <class A>
VIT_INLINE A gelu_derivative(A x) {
  const Normal<A> n = normal(x);
  return sycl::fma(A(0.39894228040143267794) * x, n.bell, n.cdf);
}

template <class A>
VIT_INLINE A gelu_tanh_derivative(A x) {
  const A limit = sizeof(A) == 8 ? A(21) : A(9.9);  // beyond it the derivative is 0 or 1, and e^-4u would overflow
  x = x > limit ? limit : x < -limit ? -limit : x;
  const A gate = tanh_gate(x);
  const A slope = A(1.5957691216057308) + A(3 * 0.071354816272600248) * x * x;  // of 2u
  const A other = tanh_gate(-x);                                                // 1 - gate, without its cancellation
  return sycl::fma(gate * other, x * slope, gate);
}

// x / (1 + e^-u), u of the sign of x. Where x is large, 1 - 1 / (1 + e^u): a factor beside 1 would be rounded at 1, by
// more than the last bit of the product.
template <class A>
VIT_INLINE A times_logistic(A x, A u) {
  const A other = logistic(-sycl::fabs(u));
  if (u > A(0)) return other > A(0) ? sycl::fma(-x, other, x) : x;  // infinite x
  return x * other;
}

template <class A>
VIT_INLINE A activate(Activation activation, A x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::gelu:
      return x * normal(x).cdf;
    case Activation::gelu_tanh:
      return x * tanh_gate(x);
    case Activation::quick_gelu:
      return times_logistic(x, A(1.702) * x);
    case Activation::silu:
      return times_logistic(x, x);
    case Activation::relu:
      return x <= A(0) ? A(0) : x;
  }
  return x;
}

template <class A>
VIT_INLINE A activation_derivative(Activation activation, A x) {
  switch (activation) {
    case Activation::none:
      return A(1);
    case Activation::gelu:
      return gelu_derivative(x);
    case Activation::gelu_tanh:
      return gelu_tanh_derivative(x);
    case Activation::quick_gelu:
      return logistic_derivative(x, A(1.702));
    case Activation::silu:
      return logistic_derivative(x, A(1));
    case Activation::relu:
      return x <= A(0) ? A(0) : A(1);
  }
  return A(1);
}
