// Brings operands of a product into the layout gemm.h reads, in the accumulator type.
//
// b [K, N]: panels [N / W][K][W], W = tile vectors * VIT_LANES columns, zeros beyond N.
// a [M, K]: rows [M][K], where they are not in the caller's memory already. Strides in elements; `batch`
// strides may be 0.
//
// Where lanes would have to write far apart, squares of VIT_LANES x VIT_LANES values are transposed in registers.
#pragma once

#include "common.h"

// Value i of lane j becomes value j of lane i.
template <int kStep = 1, class A>
VIT_INLINE void transpose(A (&x)[VIT_LANES], int lane) {
  if constexpr (kStep < VIT_LANES) {
    const auto group = sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_sub_group();
    const bool upper = lane & kStep;
    VIT_UNROLL for (int i = 0; i < VIT_LANES; ++i) {
      if (i & kStep) continue;
      const A low = x[i], high = x[i + kStep];
      const A other = sycl::permute_group_by_xor(group, upper ? low : high, kStep);
      x[i] = upper ? other : low;
      x[i + kStep] = upper ? high : other;
    }
    transpose<2 * kStep>(x, lane);
  }
}

// to[c][r] = from[r][c] for a whole square, strides in elements.
template <class A, class T>
VIT_INLINE void transpose_full(const T* from, int64 from_stride, A* to, int64 to_stride, int lane) {
  A x[VIT_LANES];
  VIT_UNROLL for (int r = 0; r < VIT_LANES; ++r) {
    const T* row = from + r * from_stride;
    x[r] = load<A>(row + lane);
  }
  transpose(x, lane);
  VIT_UNROLL for (int c = 0; c < VIT_LANES; ++c) {
    A* row = to + c * to_stride;
    row[lane] = x[c];
  }
}

// to[c * to_stride + r] = from[r * from_stride + c], elements c apart by `step`, for `rows` of r and `columns` of c, at
// most VIT_LANES of each; zeros for the other r, up to VIT_LANES of them, where kPad.
template <bool kPad, class T, class A>
VIT_INLINE void transpose_square(const T* from, int64 from_stride, int64 step, A* to, int64 to_stride, int rows,
                                 int columns, int lane) {
  if (rows >= VIT_LANES && columns >= VIT_LANES && step == 1)
    return transpose_full<A>(from, from_stride, to, to_stride, lane);
  if (lane >= columns) return;
  const int last = kPad || rows > VIT_LANES ? VIT_LANES : rows;
  for (int r = 0; r < last; ++r) {
    A value = 0;
    if (r < rows) value = load<A>(from + r * from_stride + lane * step);
    to[lane * to_stride + r] = value;
  }
}

// Panels of b; kMnMajor: b_col is 1 and the lanes are columns, else they are rows. A sub-group packs `depth` rows
// of one panel; units = batch * panels * ceil(K / depth).
template <class T, class A, bool kMnMajor>
VIT_KERNEL pack_b(const T* b, A* packed, int64 b_batch, int64 b_row, int64 b_col, int N, int K, int depth,
                  int64 units) {
  constexpr int vectors = vit::tiles::Tile<A>::vectors, width = vectors * VIT_LANES;
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane, panels = (N + width - 1) / width, chunks = (K + depth - 1) / depth;
  const int chunk = int(at.unit % chunks), panel = int(at.unit / chunks % panels);
  const int64 pair = at.unit / chunks / panels;
  const int first = panel * width, begin = chunk * depth, end = begin + depth < K ? begin + depth : K;
  const T* in = b + pair * b_batch + first * b_col;
  A* out = packed + ((pair * panels + panel) * K + begin) * width;
  if constexpr (kMnMajor) {
    const bool full = first + width <= N;
    for (int k = begin; k < end; ++k, out += width) {
      const T* row = in + k * b_row;
      VIT_UNROLL for (int j = 0; j < vectors; ++j) {
        const T* vector = row + j * VIT_LANES;
        A* to = out + j * VIT_LANES;
        if (full) {
          to[lane] = load<A>(vector + lane);
        } else {
          A value = 0;
          if (first + j * VIT_LANES + lane < N) value = load<A>(vector + lane);
          to[lane] = value;
        }
      }
    }
  } else {
    for (int k = begin; k < end; k += VIT_LANES, out += VIT_LANES * width)
      for (int j = 0; j < width; j += VIT_LANES)
        transpose_square<true>(in + j * b_col + k * b_row, b_col, b_row, out + j, width, N - first - j, end - k, lane);
  }
}

// Rows of a; kMnMajor: a_row is 1, and the matrix is transposed. A sub-group takes VIT_LANES rows and `depth`
// columns; units = batch * ceil(M / VIT_LANES) * ceil(K / depth).
template <class T, class A, bool kMnMajor>
VIT_KERNEL pack_a(const T* a, A* packed, int64 a_batch, int64 a_row, int64 a_col, int M, int K, int depth,
                  int64 units) {
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane, blocks = (M + VIT_LANES - 1) / VIT_LANES, chunks = (K + depth - 1) / depth;
  const int chunk = int(at.unit % chunks), first = int(at.unit / chunks % blocks) * VIT_LANES;
  const int64 pair = at.unit / chunks / blocks;
  const int begin = chunk * depth, end = begin + depth < K ? begin + depth : K;
  const T* in = a + pair * a_batch + first * a_row;
  A* out = packed + (pair * M + first) * K;
  const int rows = M - first < VIT_LANES ? M - first : VIT_LANES;
  if constexpr (kMnMajor) {
    for (int k = begin; k < end; k += VIT_LANES)
      transpose_square<false>(in + k * a_col, a_col, a_row, out + k, K, end - k, rows, lane);
  } else {
    for (int i = 0; i < rows; ++i) {
      const T* row = in + i * a_row + begin * a_col;
      A* to = out + int64(i) * K + begin;
      for_columns(end - begin, lane, [&](int k) VIT_ALWAYS {
        to[k + lane] = a_col == 1 ? load<A>(row + k + lane) : load<A>(row + (k + lane) * a_col);
      });
    }
  }
}
