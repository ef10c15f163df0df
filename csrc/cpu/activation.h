// GELU on vectors, shared by gelu.cpp and the epilogues of linear.cpp.
//
//   gelu       y = x Phi(x)                              Phi(x) = (1 + erf(x / sqrt 2)) / 2
//   gelu_tanh  y = x (1 + tanh(u)) / 2                   u = sqrt(2 / pi) (x + 0.044715 x^3)
//
// Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
#pragma once

#include "cpu/simd.h"

namespace vit::VIT_ISA {

template <class A>
struct GeluConstants {
  static constexpr A sqrt_half = A(0.70710678118654752440);
  static constexpr A inv_sqrt_2pi = A(0.39894228040143267794);
  static constexpr A sqrt_2_pi = A(0.79788456080286535588);
  static constexpr A cubic = A(0.044715);
};

template <class A, bool kTanh>
VIT_INLINE Vec<A> gelu(Vec<A> x) {
  using G = GeluConstants<A>;
  const Vec<A> half = broadcast(A(0.5)) * x;
  if constexpr (kTanh) {
    const Vec<A> u = G::sqrt_2_pi * x * fma(G::cubic * x, x, broadcast(A(1)));
    return fma(half, tanh(u), half);
  } else {
    return fma(half, erf(G::sqrt_half * x), half);
  }
}

// dy/dx.
template <class A, bool kTanh>
VIT_INLINE Vec<A> gelu_grad(Vec<A> x) {
  using G = GeluConstants<A>;
  const Vec<A> one = broadcast(A(1)), half = broadcast(A(0.5));
  if constexpr (kTanh) {
    const Vec<A> xx = x * x;
    const Vec<A> t = tanh(G::sqrt_2_pi * x * fma(broadcast(G::cubic), xx, one));
    const Vec<A> du = G::sqrt_2_pi * fma(broadcast(3 * G::cubic), xx, one);
    return half * fma(x * (one - t * t), du, one + t);
  } else {
    const Vec<A> phi = G::inv_sqrt_2pi * exp(A(-0.5) * x * x);
    return fma(x, phi, fma(half, erf(G::sqrt_half * x), half));
  }
}

}  // namespace vit::VIT_ISA
