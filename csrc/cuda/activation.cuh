// Activations and their derivatives on one accumulator. gelu: x Phi(x), Phi the normal distribution function;
// gelu_tanh: x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3); quick_gelu: x / (1 +
// exp(-1.702 x)); silu: x / (1 + exp(-x)); relu: max(x, 0), where NaN stays and the derivative at 0 is 0.
//
// float32 and float64 use erfc, exp and a division. The 16-bit types use Abramowitz and Stegun 7.1.26 for the tail
// Phi(-|x|) = t P(t) exp(-x^2 / 2), t = 1 / (1 + 0.2316419 |x|), absolute error 7.5e-8: 14 instructions and two of the
// special function unit instead of about 25 for erff, which matters in the epilogue of a product, where one
// multiprocessor produces 4 elements per clock. The derivative shares the exponential.
#pragma once

#include "types.cuh"

namespace vit::cuda {

inline constexpr float kSqrtHalf = 0.70710678118654752f;
inline constexpr float kInvSqrt2Pi = 0.39894228040143268f;
inline constexpr float kLog2E = 1.4426950408889634f;

// e = exp(-x^2 / 2) and Phi(x).
__device__ inline void fast_phi(float x, float& e, float& phi) {
  const float t = fast_reciprocal(fmaf(fabsf(x), 0.23164189f, 1.0f));
  e = fast_exp2(x * x * (-0.5f * kLog2E));
  float poly = fmaf(t, 0.5307027145f, -0.7265760135f);
  poly = fmaf(t, poly, 0.7107068705f);
  poly = fmaf(t, poly, -0.1422483680f);
  poly = fmaf(t, poly, 0.1274147960f);
  const float tail = poly * t * e;
  phi = x < 0 ? tail : 1.0f - tail;
}

template <class T, class A = Acc<T>>
__device__ inline A gelu(A x) {
  if constexpr (sizeof(T) == 2) {
    float e, phi;
    fast_phi(x, e, phi);
    return x * phi;
  } else {
    return x * A(0.5) * erfc(-x * A(0.70710678118654752440));
  }
}

template <class T, class A = Acc<T>>
__device__ inline A gelu_derivative(A x) {
  if constexpr (sizeof(T) == 2) {
    float e, phi;
    fast_phi(x, e, phi);
    return fmaf(x * kInvSqrt2Pi, e, phi);
  } else {
    return A(0.5) * erfc(-x * A(0.70710678118654752440)) + x * A(0.39894228040143267794) * exp(A(-0.5) * x * x);
  }
}

// 2 u of the tanh form, and 1 / (1 + exp(-2 u)).
template <class A>
__device__ inline A gelu_tanh_exponent(A x) {
  return x * (A(1.5957691216057308) + A(0.071354816272600248) * x * x);
}

template <class T, class A = Acc<T>>
__device__ inline A gelu_tanh_gate(A x) {
  const A u2 = gelu_tanh_exponent(x);
  if constexpr (sizeof(T) == 2)
    return fast_reciprocal(1.0f + fast_exp2(-kLog2E * u2));
  else
    return A(1) / (A(1) + exp(-u2));
}

template <class T, class A = Acc<T>>
__device__ inline A gelu_tanh(A x) {
  return x * gelu_tanh_gate<T>(x);
}

template <class T, class A = Acc<T>>
__device__ inline A gelu_tanh_derivative(A x) {
  const A du2 = A(1.5957691216057308) + A(3 * 0.071354816272600248) * x * x;
  if constexpr (sizeof(T) == 2) {
    const A gate = gelu_tanh_gate<T>(x);
    return gate + x * gate * (1 - gate) * du2;
  } else {  // the gate and what it lacks of 1, each to its last bits: 1 - gate loses those of float64
    const A u2 = gelu_tanh_exponent(x), e = exp(-fabs(u2));
    const A large = A(1) / (A(1) + e), small = e * large;
    return (u2 < 0 ? small : large) + x * (large * small) * du2;
  }
}

// c of the logistic function 1 / (1 + exp(-c x)).
template <class A>
inline constexpr A kQuick = A(1.702);

template <class T, class A = Acc<T>>
__device__ inline A logistic_gate(A u) {
  if constexpr (sizeof(T) == 2)
    return fast_reciprocal(1.0f + fast_exp2(-kLog2E * u));
  else
    return A(1) / (A(1) + exp(-u));
}

// The derivative of x / (1 + exp(-c x)).
template <class T, class A = Acc<T>>
__device__ inline A logistic_derivative(A x, A c) {
  const A u = c * x;
  if constexpr (sizeof(T) == 2) {
    const A gate = logistic_gate<T>(u);
    return gate + u * gate * (1 - gate);
  } else {  // see gelu_tanh_derivative
    const A e = exp(-fabs(u)), large = A(1) / (A(1) + e), small = e * large;
    return (u < 0 ? small : large) + u * (large * small);
  }
}

template <class T, class A = Acc<T>>
__device__ inline A activate(Activation activation, A x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::gelu:
      return gelu<T>(x);
    case Activation::gelu_tanh:
      return gelu_tanh<T>(x);
    case Activation::quick_gelu:
      return x * logistic_gate<T>(kQuick<A> * x);
    case Activation::silu:
      return x * logistic_gate<T>(x);
    case Activation::relu:
      return x <= A(0) ? A(0) : x;  // NaN stays
  }
  return x;
}

template <class T, class A = Acc<T>>
__device__ inline A activation_derivative(Activation activation, A x) {
  switch (activation) {
    case Activation::none:
      return 1;
    case Activation::gelu:
      return gelu_derivative<T>(x);
    case Activation::gelu_tanh:
      return gelu_tanh_derivative<T>(x);
    case Activation::quick_gelu:
      return logistic_derivative<T>(x, kQuick<A>);
    case Activation::silu:
      return logistic_derivative<T>(x, A(1));
    case Activation::relu:
      return x <= A(0) ? A(0) : A(1);
  }
  return 1;
}

}  // namespace vit::cuda
