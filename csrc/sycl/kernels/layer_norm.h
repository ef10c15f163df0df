// layer_norm: y = (x - mean) rstd weight + bias over the last dimension, rstd = 1 / sqrt(var + eps).
//
//   h = (x - mean) rstd,  g = dy weight,  dx = rstd (g - mean(g) - h mean(g h)),  dweight = sum dy h,  dbias = sum dy
//
// Saved for the backward: mean, rstd. A sub-group takes `rows` rows one after the other, its lanes are columns; two
// passes over a row in L1 give the exact variance. Forward: 2 elements moved, 8 FLOPs each; backward 3 and 14. The
// backward leaves one partial sum of dweight and dbias per sub-group, which column_sums adds in order.
#pragma once

#include "reduce.h"

template <class T, class P>
VIT_KERNEL layer_norm_fwd(const T* x, const P* weight, const P* bias, T* y, Acc<T>* mean, Acc<T>* rstd, int64 M, int C,
                          int64 x_stride, double eps, int rows) {
  using A = Acc<T>;
  const Place at = place();
  const int lane = at.lane;
  const int64 first = at.unit * rows, stop = first + rows < M ? first + rows : M;
  const A count = A(C);
  for (int64 row = first; row < stop; ++row) {
    const T* in = x + row * x_stride;
    T* out = y + row * C;
    const A mu = sum_columns<A>(C, lane, [&](int c, A sum) VIT_ALWAYS { return sum + load<A>(in + c + lane); }) / count;
    const A squares = sum_columns<A>(C, lane, [&](int c, A sum) VIT_ALWAYS {
      const A d = load<A>(in + c + lane) - mu;
      return sycl::fma(d, d, sum);
    });
    const A scale = A(1) / sycl::sqrt(squares / count + A(eps));
    for_columns(C, lane, [&](int c) VIT_ALWAYS {
      A v = (load<A>(in + c + lane) - mu) * scale;
      if (weight) v *= load<A>(weight + c + lane);
      if (bias) v += load<A>(bias + c + lane);
      store(out + c + lane, v);
    });
    if (mean && lane == 0) {
      mean[row] = mu;
      rstd[row] = scale;
    }
  }
}

// partial [2][units][C]: dweight, then dbias; null when neither is wanted.
template <class T, class P>
VIT_KERNEL layer_norm_bwd(const T* dy, const T* x, const P* weight, const Acc<T>* mean, const Acc<T>* rstd, T* dx,
                          Acc<T>* partial, int64 M, int C, int64 x_stride, int rows, int64 units) {
  using A = Acc<T>;
  const Place at = place();
  const int lane = at.lane;
  if (at.unit >= units) return;
  const int64 first = at.unit * rows, stop = first + rows < M ? first + rows : M;
  A* dweight = partial + at.unit * C;
  A* dbias = partial + (units + at.unit) * C;
  if (partial) for_columns(C, lane, [&](int c) VIT_ALWAYS { dweight[c + lane] = dbias[c + lane] = 0; });
  for (int64 row = first; row < stop; ++row) {
    const T* in = x + row * x_stride;
    const T* grad = dy + row * C;
    T* out = dx + row * C;
    const A mu = mean[row], scale = rstd[row];
    if (partial)
      for_columns(C, lane, [&](int c) VIT_ALWAYS {
        const A d = load<A>(grad + c + lane), h = (load<A>(in + c + lane) - mu) * scale;
        dweight[c + lane] += d * h;
        dbias[c + lane] += d;
      });
    if (!dx) continue;
    A sum_g = 0, sum_gh = 0;
    for_columns(C, lane, [&](int c) VIT_ALWAYS {
      A g = load<A>(grad + c + lane);
      if (weight) g *= load<A>(weight + c + lane);
      sum_g += g;
      sum_gh = sycl::fma(g, (load<A>(in + c + lane) - mu) * scale, sum_gh);
    });
    const A mean_g = sum_over_lanes(sum_g) / A(C), mean_gh = sum_over_lanes(sum_gh) / A(C);
    for_columns(C, lane, [&](int c) VIT_ALWAYS {
      A g = load<A>(grad + c + lane);
      if (weight) g *= load<A>(weight + c + lane);
      const A h = (load<A>(in + c + lane) - mu) * scale;
      store(out + c + lane, scale * (g - mean_g - h * mean_gh));
    });
  }
}
