// What happens to a finished tile of x weight^T, shared by linear.cpp and the inference engine.
#pragma once

#include "cpu/activation.h"
#include "cpu/gemm.h"

namespace vit::VIT_ISA {

// kCoarse: see gelu_coarse.
template <class T, bool kCoarse = false>
VIT_INLINE Vec<Acc<T>> activate(Activation activation, Vec<Acc<T>> x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::gelu:
      if constexpr (kCoarse)
        return gelu_coarse(x);
      else
        return gelu<T, false>(x);
    case Activation::gelu_tanh:
      return gelu<T, true>(x);
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

template <class T, class O, Activation kActivation, bool kCoarse = false>
struct Epilogue {
  using A = Acc<T>;
  const A* bias;      // [N], may be null
  const O* residual;  // [M, N] rows `stride` apart, may be null
  O* y;               // [M, N] likewise
  T* preact;          // [M, N] likewise, may be null
  int64_t stride;

  VIT_INLINE void ask(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    const int64_t at = row * stride + column;
    ask_rows<true>(y + at, stride, rows, columns);
    if (preact) ask_rows<true>(preact + at, stride, rows, columns);
    if (residual) ask_rows<false>(residual + at, stride, rows, columns);
  }

  void operator()(const Tile<A>& given) const {
    const Epilogue e = *this;  // copies: stores to y could change the originals, and each would be loaded again
    const Tile<A> tile = given;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = (tile.row + r) * e.stride + tile.column;
      for (int64_t j = 0; j < tile.columns; j += kLanes<A>) {
        const int64_t n = tile.columns - j;
        Vec<A> v = load<A>(tile.data + r * tile.stride + j);
        if (e.bias) v += load<A>(e.bias + tile.column + j, n);
        if (e.preact) store<A>(e.preact + at + j, v, n);
        v = activate<T, kCoarse>(kActivation, v);
        if (e.residual) v += load<A>(e.residual + at + j, n);
        store<A>(e.y + at + j, v, n);
      }
    }
  }
};

}  // namespace vit::VIT_ISA
