// What happens to a finished tile of x weight^T, shared by linear.cpp and the inference engine.
#pragma once

#include "cpu/activation.h"
#include "cpu/gemm.h"

namespace vit::VIT_ISA {

// kCoarse: see gelu_coarse.
template <class T, Activation kActivation, bool kCoarse>
VIT_INLINE Vec<Acc<T>> activate(Vec<Acc<T>> x) {
  if constexpr (kCoarse && kActivation == Activation::gelu)
    return gelu_coarse(x);
  else
    return activate<T, kActivation>(x);
}

template <class T, class O, Activation kActivation, bool kCoarse = false>
struct Epilogue {
  using A = Acc<T>;
  const A* bias;      // [N], may be null
  const O* residual;  // [M, N] rows `stride` apart, may be null
  O* y;               // [M, N] likewise
  T* preact;          // [M, N] likewise, may be null
  int64_t stride;
  const A* scale = nullptr;  // [N], may be null

  VIT_INLINE void prefetch(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    const int64_t at = row * stride + column;
    prefetch_rows<true>(y + at, stride, rows, columns);
    if (preact) prefetch_rows<true>(preact + at, stride, rows, columns);
    if (residual) prefetch_rows<false>(residual + at, stride, rows, columns);
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
        v = activate<T, kActivation, kCoarse>(v);
        if (e.scale) v *= load<A>(e.scale + tile.column + j, n);
        if (e.residual) v += load<A>(e.residual + at + j, n);
        store<A>(e.y + at + j, v, n);
      }
    }
  }
};

}  // namespace vit::VIT_ISA
