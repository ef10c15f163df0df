// Copies between the ops of a model: views made contiguous, tokens put together, gradients added up.
//
//   out[i] = (i1 < leads ? lead[i] : (sum over t < terms of a[t, i0 i1-leads i2 ... i5]) / divisor) + b[i]
//
// out is contiguous; a, lead and b are views, null: zeros. The terms are added in blocks of 16, in order. A
// sub-group takes `per_unit` rows of C columns, lanes are columns. Memory bound: each element is read and written once.
#pragma once

#include "common.h"

template <class T>
VIT_KERNEL move(const T* a, const T* lead, const T* b, T* out, int n1, int n2, int n3, int n4, int C, int leads,
                int terms, int64 term, double divisor, int64 a0, int64 a1, int64 a2, int64 a3, int64 a4, int64 a5,
                int64 l0, int64 l1, int64 l2, int64 l3, int64 l4, int64 l5, int64 b0, int64 b1, int64 b2, int64 b3,
                int64 b4, int64 b5, int64 rows, int per_unit) {
  using A = Acc<T>;
  const Place at = place();
  const int lane = at.lane;
  const int64 first = at.unit * per_unit, stop = first + per_unit < rows ? first + per_unit : rows;
  const int64 i3 = first / n4, i2 = i3 / n3, i1 = i2 / n2;
  int64 i0 = i1 / n1;
  int r4 = int(first - i3 * n4), r3 = int(i3 - i2 * n3), r2 = int(i2 - i1 * n2), r1 = int(i1 - i0 * n1);
  for (int64 row = first; row < stop; ++row) {
    const bool leading = r1 < leads;
    const T* from = a + i0 * a0 + (r1 - leads) * a1 + r2 * a2 + r3 * a3 + r4 * a4;
    if (leading) from = lead + i0 * l0 + r1 * l1 + r2 * l2 + r3 * l3 + r4 * l4;
    const int64 step = leading ? l5 : a5;
    const T* more = b + i0 * b0 + r1 * b1 + r2 * b2 + r3 * b3 + r4 * b4;
    const int count = leading ? (lead ? 1 : 0) : a ? terms : 0;
    T* to = out + row * C;
    for_columns(C, lane, [&](int c) VIT_ALWAYS {
      A sum = 0, blocks = 0;
      const T* at = from + (c + lane) * step;
      for (int t = 0; t < count; ++t, at += term) {
        sum += load<A>(at);
        if ((t & 15) == 15) blocks += sum, sum = 0;
      }
      if (count > 15) sum += blocks;
      if (!leading && divisor != 1) sum /= A(divisor);
      if (b) sum += load<A>(more + (c + lane) * b5);
      store(to + c + lane, sum);
    });
    // Counted on: divisions for each row take longer than a row of 16 columns.
    if (++r4 < n4) continue;
    r4 = 0;
    if (++r3 < n3) continue;
    r3 = 0;
    if (++r2 < n2) continue;
    r2 = 0;
    if (++r1 < n1) continue;
    r1 = 0, ++i0;
  }
}
