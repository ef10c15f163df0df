// Brings operands of a product into the layout gemm.h reads, in the accumulator type.
//
// Right operand b [K, N]: panels [N / W][K][W], W = tile vectors * VIT_LANES columns, zeros beyond N.
// Left operand a [M, K]: rows [M][K] (kept as they are when they are rows already), or, when its columns are what lies
// side by side (the transposed operand of a weight gradient), panels [M / R][K][R] of R tile rows, zeros beyond M.
// Strides in elements; `batch` strides may be 0.
#pragma once

#include "common.h"

// Panels of b; kRowsAdjacent: b_col is 1, else each lane reads a row of the transposed matrix. A sub-group packs
// `depth` rows of one panel; units = batch * panels * ceil(K / depth).
template <class T, class A, bool kRowsAdjacent>
VIT_KERNEL pack_right(const T* b, A* packed, int64 b_batch, int64 b_row, int64 b_col, int N, int K, int depth,
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
  const bool full = first + width <= N;
  for (int k = begin; k < end; ++k, out += width) {
    const T* row = in + k * b_row;
    VIT_UNROLL for (int j = 0; j < vectors; ++j) {
      const T* vector = kRowsAdjacent ? row + j * VIT_LANES : row + j * VIT_LANES * b_col;
      A* to = out + j * VIT_LANES;
      if (full) {
        to[lane] = load<A>(kRowsAdjacent ? vector + lane : vector + lane * b_col);
      } else {
        A value = 0;
        if (first + j * VIT_LANES + lane < N) value = load<A>(kRowsAdjacent ? vector + lane : vector + lane * b_col);
        to[lane] = value;
      }
    }
  }
}

// Panels of a: lanes are the rows of a panel. A sub-group packs `depth` columns of one panel.
template <class T, class A>
VIT_KERNEL pack_left(const T* a, A* packed, int64 a_batch, int64 a_row, int64 a_col, int M, int K, int depth,
                     int64 units) {
  constexpr int rows = vit::tiles::Tile<A>::rows;
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane, panels = (M + rows - 1) / rows, chunks = (K + depth - 1) / depth;
  const int chunk = int(at.unit % chunks), panel = int(at.unit / chunks % panels);
  const int64 pair = at.unit / chunks / panels;
  const int first = panel * rows, begin = chunk * depth, end = begin + depth < K ? begin + depth : K;
  const T* in = a + pair * a_batch + first * a_row;
  A* out = packed + ((pair * panels + panel) * K + begin) * rows;
  const bool valid = first + lane < M;
  for (int k = begin; k < end; ++k, out += rows) {
    const T* column = in + k * a_col;
    A value = 0;
    if (lane < rows && valid) value = a_row == 1 ? load<A>(column + lane) : load<A>(column + lane * a_row);
    if (lane < rows) out[lane] = value;
  }
}

// Rows of a in the accumulator type; units = batch * M, one row each.
template <class T, class A>
VIT_KERNEL widen_rows(const T* a, A* out, int64 a_batch, int64 a_row, int M, int K, int64 units) {
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane;
  const T* in = a + at.unit / M * a_batch + at.unit % M * a_row;
  A* to = out + at.unit * K;
  for_columns(K, lane, [&](int k) { to[k + lane] = load<A>(in + k + lane); });
}
