// rotary: y = x cos + r(x) sin, where r gives each pair (a, b) of a head's elements as (-b, a): neighbours, or k and
// k + D / 2.
//
//   dx = dy cos - r(dy sin),  dcos = sum of dy x,  dsin = sum of dy r(x)
//
// A sub-group takes `per_unit` tokens, its lanes are elements of a head; neighbours exchange theirs by a shuffle, since
// a load at lane ^ 1 would be a gather. The sums run over the samples and heads that share a table, in order; there a
// sub-group takes a row of the table.
#pragma once

#include "common.h"

// The value of the neighbouring lane, of which the even one is the first of its pair. All lanes call it.
template <class A>
VIT_INLINE A of_neighbour(A x) {
  const auto group = sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_sub_group();
  return sycl::permute_group_by_xor(group, x, 1);
}

template <class T, class P, bool kHalf, bool kBack>
VIT_KERNEL rotary_turn(const T* from, const P* table, T* to, int N, int H, int D, int prefix, int64 from_b,
                       int64 from_n, int64 from_h, int64 table_b, int64 table_n, int64 table_h, int64 to_b, int64 to_n,
                       int64 to_h, int64 tokens, int per_unit) {
  using A = Acc<T>;
  const Place at = place();
  const int lane = at.lane;
  const A sign = lane % 2 ? A(1) : A(-1);
  const int64 first = at.unit * per_unit, stop = first + per_unit < tokens ? first + per_unit : tokens;
  for (int64 token = first; token < stop; ++token) {
    const int64 b = token / N;
    const int n = int(token - b * N);
    for (int h = 0; h < H; ++h) {
      const T* x = from + b * from_b + n * from_n + h * from_h;
      T* y = to + b * to_b + n * to_n + h * to_h;
      if (n < prefix) {
        for_columns(D, lane, [&](int c) VIT_ALWAYS { store(y + c + lane, load<A>(x + c + lane)); });
        continue;
      }
      const P* sin = table + b * table_b + (n - prefix) * table_n + h * table_h;
      const P* cos = sin + D;
      if constexpr (kHalf) {
        const int half = D / 2;
        const T* x2 = x + half;
        T* y2 = y + half;
        const P *sin2 = sin + half, *cos2 = cos + half;
        for_columns(half, lane, [&](int c) VIT_ALWAYS {
          const A p = load<A>(x + c + lane), q = load<A>(x2 + c + lane);
          const A s = load<A>(sin + c + lane), s2 = load<A>(sin2 + c + lane);
          store(y + c + lane, p * load<A>(cos + c + lane) + (kBack ? q * s2 : -q * s));
          store(y2 + c + lane, q * load<A>(cos2 + c + lane) + (kBack ? -p * s : p * s2));
        });
      } else {
        int c = 0;
        for (; c + VIT_LANES <= D; c += VIT_LANES) {
          const A p = load<A>(x + c + lane), s = load<A>(sin + c + lane);
          const A other = kBack ? -of_neighbour(p * s) : of_neighbour(p) * s;
          store(y + c + lane, p * load<A>(cos + c + lane) + sign * other);
        }
        if (c < D) {  // the lanes beyond D have the last pair, and write nothing
          const int d = c + lane < D ? c + lane : D - 2 + lane % 2;
          const A p = load<A>(x + d), s = load<A>(sin + d);
          const A other = kBack ? -of_neighbour(p * s) : of_neighbour(p) * s;
          const A out = p * load<A>(cos + d) + sign * other;
          if (c + lane < D) store(y + c + lane, out);
        }
      }
    }
  }
}

// dtable [table_B, table_H, N - prefix, 2 D].
template <class T, class P>
VIT_KERNEL rotary_table(const T* dy, const T* x, P* dtable, int positions, int D, int prefix, int table_H, int samples,
                        int heads, int half, int64 dy_b, int64 dy_n, int64 dy_h, int64 x_b, int64 x_n, int64 x_h,
                        int64 rows) {
  using A = Acc<T>;
  const Place at = place();
  const int lane = at.lane;
  if (at.unit >= rows) return;
  const int64 group = at.unit / positions, b0 = group / table_H, h0 = group - b0 * table_H;
  const int64 n = at.unit - group * positions + prefix;
  const T* grads = dy + b0 * dy_b + n * dy_n + h0 * dy_h;
  const T* values = x + b0 * x_b + n * x_n + h0 * x_h;
  P* out = dtable + at.unit * 2 * D;
  for (int c = 0; c < D; c += VIT_LANES) {
    const int d = c + lane;
    if (d >= D) continue;
    const bool first = half ? d < D / 2 : d % 2 == 0;
    const int partner = half ? (first ? d + D / 2 : d - D / 2) : d ^ 1;
    A sin = 0, cos = 0;
    for (int b = 0; b < samples; ++b) {
      A sin_of_sample = 0, cos_of_sample = 0;
      for (int h = 0; h < heads; ++h) {
        const T *g = grads + b * dy_b + h * dy_h, *v = values + b * x_b + h * x_h;
        const A gradient = load<A>(g + d), other = load<A>(v + partner);
        sin_of_sample += gradient * (first ? -other : other);
        cos_of_sample += gradient * load<A>(v + d);
      }
      sin += sin_of_sample;
      cos += cos_of_sample;
    }
    store(out + d, sin);
    store(out + D + d, cos);
  }
}
