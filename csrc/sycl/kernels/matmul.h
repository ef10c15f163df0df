// matmul: c = a b, da = dc b^T, db = a^T dc for each of `batch` pairs: one kernel on operands of any strides (pack.h).
#pragma once

#include "gemm.h"
#include "pack.h"

template <class C, class A>
VIT_KERNEL product(const A* a, const A* packed, C* c, int M, int N, int K, int64 a_row, int64 a_batch, int64 b_batch,
                   int64 units) {
  multiply<A>(a, packed, {M, N, K, a_row, a_batch, b_batch}, units,
              [=](int64 pair, int row, int column, int lane, A value) VIT_ALWAYS {
                C* out = c + (pair * M + row) * N + column;
                store(out + lane, value);
              });
}
