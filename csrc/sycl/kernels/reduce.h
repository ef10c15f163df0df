// Sums of partial results in a fixed order, for the gradients of weights and biases.
#pragma once

#include "common.h"

// out[c] = sum over r of partial[r][c]; a sub-group takes VIT_LANES columns.
template <class A, class P>
VIT_KERNEL column_sums(const A* partial, P* out, int64 rows, int columns) {
  const Place at = place();
  const int lane = at.lane;
  const int64 first = at.unit * VIT_LANES;
  if (first >= columns) return;
  const A* in = partial + first;
  const bool valid = first + lane < columns;
  A sum = 0;
  for (int64 r = 0; r < rows; ++r)
    if (valid) sum += in[r * columns + lane];
  if (valid) store(out + first + lane, sum);
}
