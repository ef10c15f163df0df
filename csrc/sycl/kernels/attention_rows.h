// attention_rows: rows = softmax(scale q k^T) of chosen queries, what attention multiplies v with, in memory.
//
// A sub-group takes a row: its lanes are elements of the head while it goes through the keys, then keys in the softmax,
// three times over the scores. 2 L D FLOPs and L exponentials.
#pragma once

#include "functions.h"

template <class T>
VIT_KERNEL attention_rows(const T* q, const T* k, const int64* queries, Acc<T>* rows, int H, int R, int L, int D,
                          int64 q_batch, int64 q_token, int64 q_head, int64 k_batch, int64 k_token, int64 k_head,
                          int64 rows_batch, int64 rows_token, int64 rows_head, double scale, int64 count) {
  using A = Acc<T>;
  const Place at = place();
  if (at.unit >= count) return;
  const int lane = at.lane;
  const int64 r = at.unit % R, h = at.unit / R % H, b = at.unit / R / H;
  const int64 n = queries ? queries[r] : r;
  const T* query = q + b * q_batch + n * q_token + h * q_head;
  const T* key = k + b * k_batch + h * k_head;
  A* row = rows + b * rows_batch + r * rows_token + h * rows_head;
  for (int j = 0; j < L; ++j, key += k_token) {
    const A score = sum_columns<A>(D, lane, [&](int d, A sum) VIT_ALWAYS {
      return sycl::fma(load<A>(query + d + lane), load<A>(key + d + lane), sum);
    });
    if (lane == 0) row[j] = score * A(scale);
  }
  sub_group_barrier();
  A largest = -__builtin_inff();
  for_columns(L, lane, [&](int j) VIT_ALWAYS {
    const A score = row[j + lane];
    largest = score > largest ? score : largest;
  });
  const auto group = sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_sub_group();
  largest = sycl::reduce_over_group(group, largest, sycl::maximum<A>());
  A total = 0;
  for_columns(L, lane, [&](int j) VIT_ALWAYS {
    // Of -infinity only, and where no score is a number: NaN, like the reference.
    const A e = exponential(row[j + lane] - largest);
    row[j + lane] = e;
    total += e;
  });
  total = sum_over_lanes(total);
  for_columns(L, lane, [&](int j) VIT_ALWAYS { row[j + lane] /= total; });
}
