// Brings operands of a product into the layout gemm.h reads, in the accumulator type.
//
// Right operand b [K, N]: panels [N / W][K][W], W = tile vectors * VIT_LANES columns, zeros beyond N.
// Left operand a [M, K]: panels [M / R][K][R] of R tile rows, zeros beyond M. One pointer and constant offsets then
// reach all rows of a tile; as rows of their own they took 12 registers for addresses (113 instead of 190 GFLOP/s
// measured). Strides in elements; `batch` strides may be 0.
#pragma once

#include "common.h"

// Panels of b; kRowsAdjacent: b_col is 1 and lanes are columns, else lanes are rows, VIT_LANES at a time: columns that
// lie a multiple of 1 KB apart, read side by side, would evict each other from L1 (half of the time of a product). A
// sub-group packs `depth` rows of one panel; units = batch * panels * ceil(K / depth).
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
  if constexpr (kRowsAdjacent) {
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
    for (int k = begin; k < end; k += VIT_LANES, out += VIT_LANES * width) {
      if (k + lane >= end) continue;
      for (int i = 0; i < width; ++i) {
        const T* column = in + i * b_col + k * b_row;
        A value = 0;
        if (first + i < N) value = b_row == 1 ? load<A>(column + lane) : load<A>(column + lane * b_row);
        out[lane * width + i] = value;
      }
    }
  }
}

// Panels of a; kRowsAdjacent: a_row is 1 and lanes are the rows of a panel, else lanes are columns, VIT_LANES at a
// time: rows that lie a multiple of 1 KB apart, read side by side, would evict each other from L1. A sub-group packs
// `depth` columns of one panel; units = batch * panels * ceil(K / depth).
template <class T, class A, bool kRowsAdjacent>
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
  if constexpr (kRowsAdjacent) {
    const bool valid = lane < rows && first + lane < M;
    for (int k = begin; k < end; ++k, out += rows) {
      const T* column = in + k * a_col;
      A value = 0;
      if (valid) value = load<A>(column + lane);
      if (lane < rows) out[lane] = value;
    }
  } else {
    for (int k = begin; k < end; k += VIT_LANES, out += VIT_LANES * rows) {
      if (k + lane >= end) continue;
      VIT_UNROLL for (int i = 0; i < rows; ++i) {
        const T* row = in + i * a_row + k * a_col;
        A value = 0;
        if (first + i < M) value = a_col == 1 ? load<A>(row + lane) : load<A>(row + lane * a_col);
        out[lane * rows + i] = value;
      }
    }
  }
}
