// rms_norm: y = x rstd weight over the last dimension, rstd = 1 / sqrt(mean(x^2) + eps).
//
//   h = x rstd,  g = dy weight,  dx = rstd (g - h mean(g h)),  dweight = sum dy h
//
// Saved for the backward: rstd. A sub-group takes `rows` rows one after the other, its lanes are columns. Forward: 2
// elements moved, 4 FLOPs each; backward 3 and 9. The backward leaves one partial sum of dweight per sub-group, which
// column_sums adds in order.
#pragma once

#include "reduce.h"

template <class T, class P>
VIT_KERNEL rms_norm_fwd(const T* x, const P* weight, T* y, Acc<T>* rstd, int64 M, int C, int64 x_stride, double eps,
                        int rows) {
  using A = Acc<T>;
  const Place at = place();
  const int lane = at.lane;
  const int64 first = at.unit * rows, stop = first + rows < M ? first + rows : M;
  for (int64 row = first; row < stop; ++row) {
    const T* in = x + row * x_stride;
    T* out = y + row * C;
    const A squares = sum_columns<A>(C, lane, [&](int c, A sum) VIT_ALWAYS {
      const A v = load<A>(in + c + lane);
      return sycl::fma(v, v, sum);
    });
    const A scale = A(1) / sycl::sqrt(squares / A(C) + A(eps));
    for_columns(C, lane, [&](int c) VIT_ALWAYS {
      A v = load<A>(in + c + lane) * scale;
      if (weight) v *= load<A>(weight + c + lane);
      store(out + c + lane, v);
    });
    if (rstd && lane == 0) rstd[row] = scale;
  }
}

// partial [units][C] of dweight; null when it is not wanted.
template <class T, class P>
VIT_KERNEL rms_norm_bwd(const T* dy, const T* x, const P* weight, const Acc<T>* rstd, T* dx, Acc<T>* partial, int64 M,
                        int C, int64 x_stride, int rows, int64 units) {
  using A = Acc<T>;
  const Place at = place();
  const int lane = at.lane;
  if (at.unit >= units) return;
  const int64 first = at.unit * rows, stop = first + rows < M ? first + rows : M;
  A* dweight = partial + at.unit * C;
  if (partial) for_columns(C, lane, [&](int c) VIT_ALWAYS { dweight[c + lane] = 0; });
  for (int64 row = first; row < stop; ++row) {
    const T* in = x + row * x_stride;
    const T* grad = dy + row * C;
    T* out = dx + row * C;
    const A scale = rstd[row];
    if (partial)
      for_columns(C, lane, [&](int c) VIT_ALWAYS {
        dweight[c + lane] += load<A>(grad + c + lane) * (load<A>(in + c + lane) * scale);
      });
    if (!dx) continue;
    const A sum = sum_columns<A>(C, lane, [&](int c, A sum) VIT_ALWAYS {
      A g = load<A>(grad + c + lane);
      if (weight) g *= load<A>(weight + c + lane);
      return sycl::fma(g, load<A>(in + c + lane) * scale, sum);
    });
    const A mean = sum / A(C);
    for_columns(C, lane, [&](int c) VIT_ALWAYS {
      A g = load<A>(grad + c + lane);
      if (weight) g *= load<A>(weight + c + lane);
      store(out + c + lane, scale * (g - load<A>(in + c + lane) * scale * mean));
    });
  }
}
