// layer_norm of one row, shared by layer_norm.cpp and the inference engine.
#pragma once

#include "cpu/simd.h"

namespace vit::VIT_ISA {

// Calls f(j, n, chain) for every vector of a row of C elements; n of its lanes are elements. `chain` cycles through
// 0..3: a sum kept in four chains does not wait for the four cycles of an addition.
template <class A, class F>
VIT_INLINE void for_row(int64_t C, const F& f) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t j = 0;
  for (; j + 4 * lanes <= C; j += 4 * lanes)
#pragma GCC unroll 4
    for (int chain = 0; chain < 4; ++chain) f(j + chain * lanes, lanes, chain);
  for (; j + lanes <= C; j += lanes) f(j, lanes, 0);
  if (j < C) f(j, C - j, 1);
}

template <class A>
struct RowSum {
  Vec<A> chains[4] = {};
  VIT_INLINE A total() const { return sum((chains[0] + chains[1]) + (chains[2] + chains[3])); }
};

template <class A, class P>
VIT_INLINE Vec<A> load_or(const P* p, int64_t j, int64_t n, A other) {
  return p ? load<A>(p + j, n) : broadcast(other);
}

template <class A>
struct Moments {
  A mean, rstd;
};

// The moments of a row of C elements. The variance is computed in a second pass over the row (it is in L1), because
// E[x^2] - E[x]^2 cancels where |mean| is large.
template <class X>
VIT_INLINE Moments<Acc<X>> moments_of(const X* x, int64_t C, double eps) {
  using A = Acc<X>;
  RowSum<A> total, squares;
  for_row<A>(C, [&](int64_t j, int64_t n, int chain) { total.chains[chain] += load<A>(x + j, n); });
  const A mean = total.total() / static_cast<A>(C);
  for_row<A>(C, [&](int64_t j, int64_t n, int chain) {
    Vec<A> d = load<A>(x + j, n) - mean;
    if (n < kLanes<A>) d = keep(d, n, A(0));
    squares.chains[chain] = fma(d, d, squares.chains[chain]);
  });
  return {mean, A(1) / static_cast<A>(::sqrt(squares.total() / static_cast<A>(C) + static_cast<A>(eps)))};
}

// y = (x - mean) rstd weight + bias for `rows` rows of C elements, which share each load of weight and bias. x and y
// point to the first of them, rows are x_stride and y_stride elements apart.
template <int rows, class X, class Y, class P>
VIT_INLINE void norm_rows(const X* x, int64_t x_stride, Y* y, int64_t y_stride, const P* weight, const P* bias,
                          int64_t C, double eps, Moments<Acc<X>> (&moments)[rows]) {
  using A = Acc<X>;
  for (int r = 0; r < rows; ++r) moments[r] = moments_of(x + r * x_stride, C, eps);
  for_row<A>(C, [&](int64_t j, int64_t n, int) {
    const Vec<A> w = load_or(weight, j, n, A(1)), b = load_or(bias, j, n, A(0));
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Vec<A> xhat = (load<A>(x + r * x_stride + j, n) - moments[r].mean) * moments[r].rstd;
      store<A>(y + r * y_stride + j, fma(xhat, w, b), n);
    }
  });
}

// The same for one row.
template <class X, class Y, class P>
VIT_INLINE Moments<Acc<X>> norm_row(const X* x, Y* y, const P* weight, const P* bias, int64_t C, double eps) {
  Moments<Acc<X>> moments[1];
  norm_rows<1>(x, 0, y, 0, weight, bias, C, eps, moments);
  return moments[0];
}

}  // namespace vit::VIT_ISA
