// linear: y = scale activation(x weight^T + bias) + residual.
//
//   dz = scale dy activation'(preact),  dx = dz weight,  dweight = dz^T x,
//   dbias = sum over rows of dz,  dscale = sum over rows of dy activation(preact)
//
// Saved for the backward: preact = x weight^T + bias, where there is an activation or the scale has a gradient. Bias,
// activation, scale and residual are applied to a tile as it leaves the registers. The backward makes dz and the
// partial sums of dbias and dscale in one pass over dy (where dz is dy, those of dbias while it is transposed for
// dweight); column_sums adds the partial sums in order. Its two products are those of matmul.h.
#pragma once

#include "epilogue.h"
#include "matmul.h"
#include "reduce.h"

template <class T, class P, class O, class A>
VIT_KERNEL linear_fwd(const A* x, const A* packed, const P* bias, const A* scale, const O* residual, O* y, T* preact,
                      int M, int N, int K, int64 x_row, Activation activation, int64 units) {
  multiply<A>(x, packed, {M, N, K, x_row, 0, 0}, units, [=](int64, int row, int column, int lane, A value) VIT_ALWAYS {
    epilogue(value, int64(row) * N + column, column, lane, bias, scale, residual, y, preact, activation);
  });
}

// dz [M, N] (null: not wanted) and the sums of `rows` rows each, of dbias and of dscale, [units][N] (null likewise).
template <class T, class O>
VIT_KERNEL linear_dz(const O* dy, const T* preact, const Acc<T>* scale, Acc<T>* dz, Acc<T>* partial,
                     Acc<T>* partial_scale, int M, int N, Activation activation, int rows, int64 units) {
  using A = Acc<T>;
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane;
  const int64 first = at.unit * rows, stop = first + rows < M ? first + rows : M;
  A* total = partial + at.unit * N;
  A* scaled = partial_scale + at.unit * N;
  if (partial) for_columns(N, lane, [&](int n) VIT_ALWAYS { total[n + lane] = 0; });
  if (partial_scale) for_columns(N, lane, [&](int n) VIT_ALWAYS { scaled[n + lane] = 0; });
  for (int64 row = first; row < stop; ++row) {
    const O* in = dy + row * N;
    const T* z = preact + row * N;
    A* out = dz + row * N;
    for_columns(N, lane, [&](int n) VIT_ALWAYS {
      A v = load<A>(in + n + lane);
      if (partial_scale) scaled[n + lane] += v * activate(activation, load<A>(z + n + lane));
      if (scale) v *= scale[n + lane];
      if (activation != Activation::none) v *= activation_derivative(activation, load<A>(z + n + lane));
      if (dz) out[n + lane] = v;
      if (partial) total[n + lane] += v;
    });
  }
}

// dz^T [N, M], the a of dweight, and the sums of linear_dz where that had nothing else to do (partial may be
// null): both see the same rows in the same order. A sub-group takes VIT_LANES columns and `chunks` times `rows` rows,
// a multiple of VIT_LANES.
template <class A>
VIT_KERNEL linear_transpose(const A* dz, A* transposed, A* partial, int M, int N, int rows, int chunks, int64 units) {
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane, depth = rows * chunks, runs = (M + depth - 1) / depth;
  const int first = int(at.unit / runs) * VIT_LANES, begin = int(at.unit % runs) * depth;
  const int end = begin + depth < M ? begin + depth : M, columns = N - first;
  for (int chunk = begin; chunk < end; chunk += rows) {
    const int stop = chunk + rows < end ? chunk + rows : end;
    A sum = 0;
    for (int m = chunk; m < stop; m += VIT_LANES) {
      const A* from = dz + int64(m) * N + first;
      A* to = transposed + int64(first) * M + m;
      const int count = stop - m < VIT_LANES ? stop - m : VIT_LANES;
      if (columns >= VIT_LANES && count == VIT_LANES) {
        VIT_UNROLL for (int r = 0; r < VIT_LANES; ++r) {
          const A* row = from + int64(r) * N;
          sum += row[lane];
        }
        transpose_full<A>(from, N, to, M, lane);
      } else if (lane < columns) {
        for (int r = 0; r < count; ++r) {
          const A value = from[int64(r) * N + lane];
          sum += value;
          to[int64(lane) * M + r] = value;
        }
      }
    }
    if (partial && lane < columns) {
      A* sums = partial + int64(chunk / rows) * N + first;
      sums[lane] = sum;
    }
  }
}
