// rms_norm of rows, shared by rms_norm.cpp and the inference engine.
#pragma once

#include "cpu/layer_norm.h"

namespace vit::VIT_ISA {

// y = x rstd weight for `rows` rows of C elements, which share each load of the weight. x and y point to the first of
// them, rows are x_stride and y_stride elements apart; y may be x.
template <int rows, class X, class Y, class P>
VIT_INLINE void rms_norm_rows(const X* x, int64_t x_stride, Y* y, int64_t y_stride, const P* weight, int64_t C,
                              double eps, Acc<X> (&rstd)[rows]) {
  using A = Acc<X>;
  for (int r = 0; r < rows; ++r) {
    RowSum<A> squares;
    for_row<A>(C, [&](int64_t j, int64_t n, int chain) {
      const Vec<A> v = load<A>(x + r * x_stride + j, n);
      squares.chains[chain] = fma(v, v, squares.chains[chain]);
    });
    rstd[r] = A(1) / static_cast<A>(::sqrt(squares.total() / static_cast<A>(C) + static_cast<A>(eps)));
  }
  for_row<A>(C, [&](int64_t j, int64_t n, int) {
    const Vec<A> w = load_or(weight, j, n, A(1));
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) store<A>(y + r * y_stride + j, load<A>(x + r * x_stride + j, n) * rstd[r] * w, n);
  });
}

}  // namespace vit::VIT_ISA
