// What happens to a finished tile of x weight^T, shared by linear.cpp and the inference engine.
#pragma once

#include "cpu/activation.h"
#include "cpu/gemm.h"

namespace vit::VIT_ISA {

template <class T>
VIT_INLINE Vec<Acc<T>> activate(Activation activation, Vec<Acc<T>> x) {
  if (activation == Activation::gelu) return gelu<T, false>(x);
  if (activation == Activation::gelu_tanh) return gelu<T, true>(x);
  return x;
}

// Calls f(constant) with the activation known at compile time, so that a row is one branch-free loop.
template <Activation kActivation>
struct Constant {
  static constexpr Activation value = kActivation;
};
template <class F>
VIT_INLINE void with_activation(Activation activation, const F& f) {
  if (activation == Activation::gelu) return f(Constant<Activation::gelu>{});
  if (activation == Activation::gelu_tanh) return f(Constant<Activation::gelu_tanh>{});
  f(Constant<Activation::none>{});
}

template <class T, class O, Activation kActivation>
struct Epilogue {
  using A = Acc<T>;
  const A* bias;      // [N], may be null
  const O* residual;  // [M, N] rows `stride` apart, may be null
  O* y;               // [M, N] likewise
  T* preact;          // [M, N] likewise, may be null
  int64_t stride;

  void operator()(const Tile<A>& tile) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = (tile.row + r) * stride + tile.column;
      for (int64_t j = 0; j < tile.columns; j += kLanes<A>) {
        const int64_t n = tile.columns - j;
        Vec<A> v = load<A>(tile.data + r * tile.stride + j);
        if (bias) v += load<A>(bias + tile.column + j, n);
        if (preact) store<A>(preact + at + j, v, n);
        v = activate<T>(kActivation, v);
        if (residual) v += load<A>(residual + at + j, n);
        store<A>(y + at + j, v, n);
      }
    }
  }
};

}  // namespace vit::VIT_ISA
